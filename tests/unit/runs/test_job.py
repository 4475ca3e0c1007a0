"""What ``assemble`` decides of kernels, with an imitated one; a wrong one is passed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.configuration.compose import compose
from alignlab.errors import ConfigError
from alignlab.models import kernel
from alignlab.ops import ragged
from alignlab.ops.ragged import naive_ragged_attention
from alignlab.ops.ragged_kernels import Kernel
from alignlab.runs import job
from alignlab.runs.job import Job, assemble, attach_reference, prepare_data
from alignlab.train.loop import Progress, StepReport, fit


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Any, *others: Any) -> Tensor:
    return naive_ragged_attention(query, key, value, plan._replace(kv_index=torch.arange(len(key))), *others)


SOUND = Kernel("a sound kernel", attend, lambda call: "")
WRONG = Kernel("a wrong kernel", lambda q, k, v, *others: attend(q, k, v.flip(0), *others), lambda call: "")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))

    def assembled(*words: str, serves: Kernel | None = None) -> Job:
        with monkeypatch.context() as patch:
            if serves is not None:
                patch.setattr(kernel, "takes_ragged", lambda *arguments: (True, serves.name))
            patch.setattr(ragged, "kernel_for", lambda *arguments: (serves, ""))
            common = ("objective=dpo", "model=tiny", "data=sums", "data.options={rows: 12}", "engine=local")
            config = compose([*common, "train.global_batch_size=4", *words]).config
            return assemble(config, prepare_data(config))

    return assembled


def losses(made: Job) -> list[float]:
    seen: list[float] = []

    class Hooks:
        def after_step(self, report: StepReport) -> bool:
            assert report.metrics is not None
            seen.append(report.metrics["loss"])
            return len(seen) == 2

    attach_reference(made)
    config = made.config
    fit(
        made.engine, made.data.objective, made.plans, made.loader, config.optim, config.train, config.seed, Progress(),
        Hooks(),
    )  # fmt: skip
    return seen


def test_a_kernel_that_serves_gets_ragged_plans(make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make("optim.learning_rate=1e-3")
    assert "attention" not in plain.layout_line  # on a CPU there is nothing to say
    served = make("optim.learning_rate=1e-3", serves=SOUND)
    assert served.layout_line.endswith("; attention by a sound kernel")
    for made, by_nodes in ((plain, True), (served, False)):
        batch = next(iter(made.loader.of(made.plans.at(0))))
        assert batch.plan is not None
        assert (batch.plan.nodes is not None) == by_nodes
        assert not batch.plan.groups
    monkeypatch.setattr(ragged, "kernel_for", lambda *arguments: (SOUND, ""))
    assert losses(served) == pytest.approx(losses(plain), rel=1e-5)


def test_a_kernel_that_disagrees_is_passed_over(make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.REAL_TOLERANCE, torch.float32, 1e-4)  # the tiny model is nearly flat
    made = make(serves=WRONG)
    assert "; attention in padded groups (a wrong kernel and padded groups differ by" in made.layout_line
    batch = next(iter(made.loader.of(made.plans.at(0))))
    assert batch.plan is not None
    assert batch.plan.groups


def test_fused_code_is_asked_for_by_key(make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(job, "compile_layers", lambda model, device: seen.append((type(model).__name__, device.type)))
    make()
    assert seen == []
    make("train.torch_compile=true")
    assert seen == [("LlamaForCausalLM", "cpu")]
    with pytest.raises(ConfigError, match=r"model\.use_liger_kernel=true needs"):
        make("model.use_liger_kernel=true")
    with pytest.raises(ConfigError, match="zero3 gathers weights"):
        make("train.torch_compile=true", "engine=zero3")
