"""What only a GPU can show: kernels prove themselves, a step waits for the device once, the paths agree.

scripts/gpu_check.sh          # runs these among others;  or: pytest -m gpu tests/gpu
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.configuration.compose import compose
from alignlab.data.loader import Ahead
from alignlab.models import kernel
from alignlab.ops import ragged
from alignlab.ops.ragged_kernels import Call
from alignlab.runs.job import Job, assemble, attach_reference, prepare_data
from alignlab.train.loop import Progress, StepReport, fit
from alignlab.train.step import passes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]
PLAIN = Call(head_dim=64, value_dim=64, shared=1, own_scale=None, windowed=False, capped=False, sinks=False)
CALLS = {
    "plain": {}, "grouped": {"shared": 4}, "128": {"head_dim": 128, "value_dim": 128}, "scale": {"own_scale": 0.3},
    "window": {"windowed": True}, "cap": {"capped": True},
}  # fmt: skip


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return torch.device("cuda", torch.cuda.current_device())


def job_of(objective: str, *words: str) -> Job:
    common = (f"objective={objective}", "model=tiny", "data=sums", "data.options={rows: 48}", "engine=local")
    sizes = ("train.global_batch_size=8", "train.max_steps=4", "train.per_device_train_batch_size=2")
    config = compose([*common, *sizes, *words], needs=("model", "data", "objective")).config
    job = assemble(config, prepare_data(config))
    attach_reference(job)
    return job


def train(job: Job, after: Callable[[StepReport], bool]) -> None:
    class Hooks:
        def after_step(self, report: StepReport) -> bool:
            return after(report)

    config, objective = job.config, job.data.objective
    with Ahead(job.plans, job.loader, passes(objective)) as plans:
        fit(job.engine, objective, plans, job.loader, config.optim, config.train, config.seed, Progress(), Hooks())
    job.engine.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_serves_and_is_right(cuda: torch.device, call: str, dtype: torch.dtype) -> None:
    """``kernel_for`` runs the proof; that nothing serves is a finding, unless it is a stated limit."""
    if torch.cuda.get_device_capability(cuda) < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    found, reason = ragged.kernel_for(PLAIN._replace(**CALLS[call]), dtype, cuda)
    if found is None and all(each.lacks(PLAIN._replace(**CALLS[call])) for each in ragged.kernels()):
        pytest.skip(f"no installed kernel claims to: {reason}")
    assert found is not None, reason


@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_bfloat16_takes_ragged_kernels_and_float32_does_not(cuda: torch.device, layout: str) -> None:
    job = job_of("sft", f"model.layout={layout}")
    batch = next(iter(job.loader.of(job.plans.at(0))))
    assert batch.plan is not None
    if ragged.kernel_for(Call(32, 32, 1, None, False, False, False), torch.bfloat16, cuda)[0] is not None:
        assert "attention by" in job.layout_line
        assert batch.plan.groups == ()
    job = job_of("sft", f"model.layout={layout}", "model.dtype=fp32")
    batch = next(iter(job.loader.of(job.plans.at(0))))
    assert "padded groups (no kernel for float32)" in job.layout_line
    assert batch.plan is not None
    assert batch.plan.groups


def test_both_forms_agree(cuda: torch.device) -> None:
    job = job_of("sft")
    assert kernel.agrees(
        kernel.difference(job.engine.score, kernel.comparison_batch(job.scorer.inner, "tree", cuda), "lm"),
        torch.bfloat16,
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("objective", ["sft", "dpo", "ift", "reward", "kto"])
def test_a_step_waits_for_the_norm_alone(cuda: torch.device, objective: str, dtype: str) -> None:
    """torch's sync debug mode warns of every wait; the loop may ask for one number a step: the gradient norm."""
    job = job_of(objective, f"model.dtype={dtype}", "train.logging_steps=100")
    waits: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def after(report: StepReport) -> bool:
            waits.append(sum("synchroniz" in str(one.message) for one in caught))
            caught.clear()
            return False

        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(job, after)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # The first step makes what is made once; the last one reduces the figures that are logged.
    assert waits[1:-1] == [1] * (len(waits) - 2), waits


@pytest.mark.parametrize("objective", ["sft", "dpo", "ift", "reward"])
def test_layouts_train_alike_in_float32(cuda: torch.device, objective: str) -> None:
    losses: dict[str, list[float]] = {}
    for layout in ("tree", "packed", "rows"):
        seen: list[float] = []

        def after(report: StepReport, seen: list[float] = seen) -> bool:
            assert report.metrics is not None
            seen.append(report.metrics["loss"])
            return False

        train(job_of(objective, f"model.layout={layout}", "model.dtype=fp32", "optim.learning_rate=1e-4"), after)
        losses[layout] = seen
    assert losses["tree"] == pytest.approx(losses["rows"], rel=1e-4, abs=1e-6)
    assert losses["packed"] == pytest.approx(losses["rows"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("word", ["train.torch_compile=true", "model.use_liger_kernel=true"])
def test_fused_code_trains_alike(cuda: torch.device, word: str) -> None:
    if "liger" in word:
        pytest.importorskip("liger_kernel", reason="the extra liger is not installed")

    def losses(*words: str) -> list[float]:
        seen: list[float] = []

        def after(report: StepReport) -> bool:
            assert report.metrics is not None
            seen.append(report.metrics["loss"])
            return False

        train(job_of("sft", "model.dtype=fp32", *words), after)
        return seen

    plain: Any = losses()
    assert losses(word) == pytest.approx(plain, rel=1e-4)


def test_memory_is_pinned_on_its_way(cuda: torch.device) -> None:
    job = job_of("sft")
    next(iter(job.loader.of(job.plans.at(0))))
    assert job.loader.current is not None
    assert job.loader.current.input_ids.is_pinned()
