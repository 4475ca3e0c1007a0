"""``alignlab verify``: what it prints, and that every cell of its matrix can fail.

Faults are put into the running trainer, one at a time, and the cell that stands for the fault has to name it while
the others stay green.  Faults of launched ranks travel in a plug-in, which every rank loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alignlab.data.loader
import alignlab.equivalence.runs
import alignlab.runs.job
from alignlab.engine import base as engines
from alignlab.engine.local import LocalEngine
from alignlab.equivalence.cells import chosen, matrix
from alignlab.equivalence.compare import Trace, differences, relative

LOCAL = "micro_batches,packed,tree,merge_prompts,reference,checkpointing,eager,resume,export"

PLUGIN = """
from dataclasses import dataclass

from alignlab.objectives.base import BaseObjective
from alignlab.registry import register_objective
from alignlab.types import Ask, LossOutput, Unit


@dataclass
class {name}Config:
    surprise: float = 1.5


@register_objective
class {name}(BaseObjective):
    name = "{name}"
    units = (Unit.TOKEN,)
    Config = {name}Config

    def __call__(self, score, batch, context):
        logps = score(batch, Ask("logps")).logps[batch.seq_idx]
        weights = batch.sequence_values["weight"].to(logps.dtype)[batch.seq_of]
        {body}
        return LossOutput({{Unit.TOKEN: loss}}, {{}})
"""
SUM = "loss = (weights * (logps + self.config.surprise) ** 2).sum()"
MEAN = "loss = (weights * (logps + self.config.surprise) ** 2).mean()"
NEIGHBOUR = "loss = (weights * (logps - logps.detach().mean()) ** 2).sum()"


@pytest.fixture
def verify(run: Callable[..., Any], settings: list[str]) -> Callable[..., dict[str, Any]]:
    """Run the verb for its JSON answer; the exit code is put in."""

    def command(*words: str, cells: str = LOCAL) -> dict[str, Any]:
        answer = run("verify", *settings, "rows=9", f"cells=[{cells}]", *words, "--json")
        return {**answer.json, "exit_code": answer.code}

    return command


def statuses(answer: dict[str, Any]) -> dict[str, str]:
    return {cell["cell"]: cell["status"] for cell in answer["cells"]}


def plugin(home: Path, name: str, body: str) -> list[str]:
    path = home / f"{name}.py"
    path.write_text(PLUGIN.format(name=name, body=body))
    return [f"plugins=[{path}]", f"objective={name}"]


# ---------------------------------------------------------------------------------------------------------------
# What it prints
# ---------------------------------------------------------------------------------------------------------------


def test_sound_code_passes(verify: Callable[..., dict[str, Any]]) -> None:
    answer = verify()
    assert answer["exit_code"] == 0
    assert answer["ok"] is True
    assert set(statuses(answer).values()) == {"ok"}
    assert (answer["rows"], answer["examples"], answer["steps"], answer["layout"]) == (9, 9, 3, "tree")
    for cell in answer["cells"]:
        assert cell["differences"].keys() == cell["tolerances"].keys()
        assert cell["dtype"] == "float64"
    cells = {cell["cell"]: cell for cell in answer["cells"]}
    assert cells["resume"]["tolerances"] == dict.fromkeys(("loss", "grad_norm", "statistics", "update"), 0.0)
    assert cells["export"]["differences"].keys() == {"scores"}
    assert cells["tree"]["differences"]["update"] > 0  # two ways indeed


def test_the_table(run: Callable[..., Any], settings: list[str]) -> None:
    answer = run("verify", *settings, "objective=sft", "rows=6", "cells=[micro*, reference]", "layers=1", "steps=2")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("object   sft   6 rows, 6 examples in 2 steps   layout tree   plain engine fp64")
    assert lines[2].startswith("micro_batches")
    assert lines[2].endswith("ok")
    assert lines[3].split(None, 1)[0] == "reference"
    assert lines[3].endswith("skipped: sft needs no reference")
    assert lines[4].startswith("verdict  1 ok, 0 failed, 1 skipped")
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cells=[packt]"], "cells: there is none called 'packt'. Known: micro_batches, packed,"),
        (["steps=1"], "steps: a resumed run needs at least 2"),
        (["rows=many"], "rows: many (expected"),
        (["rows=4"], "4 rows hold 4 example(s), and 3 steps need at least 6"),
        (["layers=9"], "layers: 9 is not between 1 and the 2 that"),
    ],
)
def test_what_it_is_told_wrongly(run: Callable[..., Any], settings: list[str], words: list[str], expected: str) -> None:
    answer = run("verify", *settings, *words)
    assert answer.code == 2
    assert expected in answer.err


def test_nothing_that_passes_is_no_success(verify: Callable[..., dict[str, Any]]) -> None:
    """All cells skipped: nothing was verified."""
    answer = verify("objective=sft", cells="reference")
    assert answer["exit_code"] == 1
    assert answer["counts"] == {"ok": 0, "failed": 0, "skipped": 1}


def test_a_difference_that_is_no_number_fails() -> None:
    assert relative(float("nan"), 1.0) == float("inf")
    assert relative(0.0, 1e-9) == pytest.approx(1e-3)
    one, other = (Trace("", losses=[1.0] * n, grad_norms=[1.0] * n) for n in (2, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignlab.equivalence.compare.update_difference", lambda *_: 0.0)
        assert differences(one, other, first_statistics=None)["loss"] == float("inf")
        one.statistics, other.statistics = [{"a": 1.0}], [{"b": 1.0}]
        assert differences(one, other, first_statistics=0)["statistics"] == float("inf")


def test_every_cell_has_its_own_name_and_two_ways() -> None:
    cells = matrix("fp64", "fp32", "tree")
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(cell.variant != cell.base for cell in cells)


# ---------------------------------------------------------------------------------------------------------------
# Broken objectives from outside
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "failing"),
    [("Summed", SUM, []), ("Averaged", MEAN, ["micro_batches"]), ("Nosy", NEIGHBOUR, ["micro_batches"])],
)
def test_a_plug_in(home: Path, verify: Callable[..., dict[str, Any]], name: str, body: str, failing: list[str]) -> None:
    answer = verify(*plugin(home, name, body), cells="micro_batches,packed,export")
    assert [cell for cell, status in statuses(answer).items() if status == "failed"] == failing
    assert answer["exit_code"] == (1 if failing else 0)


# ---------------------------------------------------------------------------------------------------------------
# Broken trainers
# ---------------------------------------------------------------------------------------------------------------


def _pack_with(patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    whole = alignlab.data.loader.pack

    def changed(*arguments: Any, **options: Any) -> Any:
        return change(whole(*arguments, **options), options)

    patch.setattr(alignlab.data.loader, "pack", changed)


def tree_mask(patch: pytest.MonkeyPatch) -> None:
    """Every query sees all the keys of its node, those of later tokens too."""

    def change(batch: Any, options: dict[str, Any]) -> Any:
        if options["layout"] != "tree":
            return batch
        nodes, keys = batch.plan.nodes, batch.plan.cu_k.diff().tolist()
        masks = tuple(torch.ones(q, k, dtype=torch.bool) for q, k in zip(nodes.sizes, keys, strict=True))
        return batch._replace(plan=batch.plan._replace(nodes=replace(nodes, masks=masks)))

    _pack_with(patch, change)


def stretched_positions(patch: pytest.MonkeyPatch) -> None:
    """A packed token's position is twice what it is; an offset alone would change nothing, as they are relative."""

    def change(batch: Any, options: dict[str, Any]) -> Any:
        if options["layout"] != "packed":
            return batch
        return batch._replace(position_ids=batch.position_ids * 2)

    _pack_with(patch, change)


def merged_weights(patch: pytest.MonkeyPatch) -> None:
    """Merging forgets a pair's weight."""

    def change(batch: Any, options: dict[str, Any]) -> Any:
        if not options["merge_prompts"]:
            return batch
        weight = batch.pair_values["weight"].clone()
        weight[0] = 0.0
        return batch._replace(pair_values={**batch.pair_values, "weight": weight})

    _pack_with(patch, change)


def reference_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The cached number of a sequence is its neighbour's."""
    whole = alignlab.runs.job.reference_logps

    def rolled(*arguments: Any, **options: Any) -> Any:
        found = whole(*arguments, **options)
        known = np.isfinite(found.sequences)
        found.sequences[known] = np.roll(found.sequences[known], 1)
        return found

    patch.setattr(alignlab.runs.job, "reference_logps", rolled)


def frozen_layer(patch: pytest.MonkeyPatch) -> None:
    """Recomputing loses a layer's gradient."""
    whole = engines.enable_checkpointing

    def lossy(module: Any) -> None:
        whole(module)
        list(module.parameters())[1].requires_grad_(False)

    patch.setattr(engines, "enable_checkpointing", lossy)


def eager_with_another_scale(patch: pytest.MonkeyPatch) -> None:
    """Eager attention sharpens what the kernel does not."""
    whole = alignlab.equivalence.runs.assemble

    def sharpened(config: Any, data: Any) -> Any:
        job = whole(config, data)
        for module in job.scorer.modules():
            if config.model.attn_implementation == "eager" and hasattr(module, "scaling"):
                module.scaling *= 1.01
        return job

    patch.setattr(alignlab.equivalence.runs, "assemble", sharpened)


def forgotten_moments(patch: pytest.MonkeyPatch) -> None:
    """A resumed run begins with empty optimizer state."""
    whole = LocalEngine.load

    def forgetful(engine: Any, folder: Path) -> None:
        whole(engine, folder)
        engine._optimizer.state.clear()

    patch.setattr(LocalEngine, "load", forgetful)


def permuted_export(patch: pytest.MonkeyPatch) -> None:
    """Two rows of an exported matrix change places."""
    whole = alignlab.equivalence.runs.export_model

    def permuting(job: Any, target: Path) -> None:
        whole(job, target)
        file = target / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        tensors[name] = torch.roll(tensors[name], 1, 0).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})

    patch.setattr(alignlab.equivalence.runs, "export_model", permuting)


FAULTS = {
    "tree": tree_mask,
    "packed": stretched_positions,
    "merge_prompts": merged_weights,
    "reference": reference_off_by_one,
    "checkpointing": frozen_layer,
    "eager": eager_with_another_scale,
    "resume": forgotten_moments,
    "export": permuted_export,
}


@pytest.mark.parametrize("cell", FAULTS)
def test_every_cell_can_fail(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cell: str
) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    FAULTS[cell](monkeypatch)
    bystander = "checkpointing" if cell == "resume" else "resume"
    answer = verify("steps=2", cells=f"{cell},{bystander}")
    assert statuses(answer) == {cell: "failed", bystander: "ok"}, json.dumps(answer["cells"], indent=1)
    assert answer["exit_code"] == 1


def test_checkpointing_that_does_nothing_fails(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal numbers are no proof where the setting has no effect: in eval mode transformers recompute nothing."""
    monkeypatch.setattr(LocalEngine, "train", lambda engine, mode=True: engine.module.train(False))
    answer = verify("steps=2", cells="checkpointing")
    assert statuses(answer) == {"checkpointing": "failed"}
    assert answer["cells"][0]["reason"] == "train.gradient_checkpointing=true, and nothing is recomputed"


def test_a_variant_that_crashes_fails_and_a_base_that_crashes_is_our_bug(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = alignlab.equivalence.runs.assemble

    def crashing(config: Any, data: Any) -> Any:
        if config.train.gradient_checkpointing or config.train.per_device_train_batch_size == 1:
            raise RuntimeError("no such kernel")
        return whole(config, data)

    monkeypatch.setattr(alignlab.equivalence.runs, "assemble", crashing)
    answer = verify("steps=2", cells="micro_batches,checkpointing,resume")
    assert statuses(answer) == {"micro_batches": "failed", "checkpointing": "failed", "resume": "ok"}
    assert answer["cells"][0]["reason"] == "RuntimeError: no such kernel"
    monkeypatch.setattr(alignlab.equivalence.runs, "assemble", lambda config, data: 1 / 0)
    assert verify(cells="resume")["exit_code"] == 70


RANK_FAULTS = '''
"""A fault for each engine; zero1 stays sound."""
from dataclasses import replace

import alignlab.data.loader
import alignlab.engine.base
import alignlab.runs.job
import alignlab.train.loop
import alignlab.train.step

engine = {}
make, context_of = alignlab.runs.job.make_engine, alignlab.train.loop.context_of
to_device = alignlab.data.loader.to_device


def noted(name, *arguments, **options):
    made = make(name, *arguments, **options)
    engine["name"] = name
    if name == "zero0":
        made.dp_true, made.dp = made.dp, 1  # the engine's mean over ranks is not undone
    return made


def own_totals(*arguments):
    """The divisor is this rank's own count."""
    context = context_of(*arguments)
    if engine["name"] == "zero2":
        return replace(context, totals={unit: count / 2 for unit, count in context.totals.items()})
    return context


def weighty(batch, device):
    """A filler counts."""
    batch = to_device(batch, device)
    return batch._replace(weight=1.0) if engine["name"] == "zero3" else batch


if alignlab.dist.world_size() > 1:
    alignlab.runs.job.make_engine = noted
    alignlab.train.loop.context_of = own_totals
    alignlab.data.loader.to_device = weighty
'''


def test_cells_of_several_ranks_can_fail(home: Path, verify: Callable[..., dict[str, Any]]) -> None:
    path = home / "rank_faults.py"
    path.write_text(RANK_FAULTS)
    answer = verify(f"plugins=[{path}]", "steps=2", "rows=6", cells="ranks_*")
    found = statuses(answer)
    assert found.pop("ranks_resume") == "ok"  # broken alike on both sides
    assert found == {
        "ranks_zero0": "failed", "ranks_zero1": "ok", "ranks_zero2": "failed", "ranks_zero3": "failed",
    }, json.dumps(answer["cells"], indent=1)  # fmt: skip
    assert answer["exit_code"] == 1


@pytest.mark.nightly
def test_ranks_that_die_fail_their_cells(home: Path, verify: Callable[..., dict[str, Any]]) -> None:
    path = home / "deadly.py"
    path.write_text("from alignlab import dist\nif dist.world_size() > 1:\n    raise SystemExit('gone')\n")
    answer = verify(f"plugins=[{path}]", cells="ranks_zero2")
    assert statuses(answer) == {"ranks_zero2": "failed"}
    assert "the ranks ended early" in answer["cells"][0]["reason"]


def test_fused_code_is_compared_on_request_and_where_it_is_used() -> None:
    cells = matrix("fp64", "fp32", "tree")
    fused = {"compiled", "liger"}
    assert {cell.name for cell in cells} - {cell.name for cell in chosen(cells, [])} == fused
    assert {cell.name for cell in chosen(cells, [], ["compiled"])} & fused == {"compiled"}
    assert [cell.name for cell in chosen(cells, ["lig*"])] == ["liger"]


def test_liger_is_skipped_where_it_cannot_run(verify: Callable[..., dict[str, Any]]) -> None:
    answer = verify("steps=2", "model.use_liger_kernel=true", cells="liger,resume")
    assert statuses(answer) == {"liger": "skipped", "resume": "ok"}  # and the base is the plain model
    assert answer["cells"][0]["reason"].startswith("model.use_liger_kernel=true needs")


@pytest.mark.nightly
def test_compiled_layers_train_alike(verify: Callable[..., dict[str, Any]]) -> None:
    answer = verify("steps=2", "train.torch_compile=true", cells="compiled")
    assert statuses(answer) == {"compiled": "ok"}, answer
