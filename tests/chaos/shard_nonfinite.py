"""Numbers that are not finite, at one micro-batch of one rank: the same outcome in every engine and both precisions.

Four faults x two ranks x five engines x two precisions, each as a run that skips and as one that stops.  One process
has no second rank: there the fault moves to the second micro-batch.  Then the passes that train nothing: evaluation and
the reference's.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from harness import Harness, Run
from run import Case

FAULTS = {"nan_loss": "loss", "inf_loss": "loss", "nan_gradient": "gradient", "overflow": "gradient"}
ENGINES = ("local", "zero0", "zero1", "zero2", "zero3")
STEPS, BAD = 6, 3
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3}
"""Relative, of the losses behind the skipped step, against one process's."""


def cases() -> list[Case]:
    """80 of training, 9 of other passes."""
    found = [
        Case(f"{dtype}-{engine}-rank{rank}-{fault}", partial(_training, fault, rank, engine, dtype))
        for dtype in ("fp32", "bf16")
        for engine in ENGINES
        for rank in (0, 1)
        for fault in FAULTS
    ]
    for engine in ("local", "zero2", "zero3"):
        found += [
            Case(f"evaluation-{policy}-{engine}", partial(_evaluation, policy, engine)) for policy in ("stop", "skip")
        ]
        found.append(Case(f"reference-{engine}", partial(_reference, engine)))
    return found


def make(harness: Harness, engine: str, *more: str) -> Run:
    """A run of small steps: every pair a micro-batch of its own."""
    return harness.run(
        engine, "train.per_device_train_batch_size=1", "train.save_total_limit=null", *more,
        ranks=1 if engine == "local" else 2, steps=STEPS, save_steps=1,
    )  # fmt: skip


def _rule(fault: str, point: str, rank: int, engine: str, step: int | str) -> str:
    at = (0, rank) if engine == "local" else (rank, 0)
    return f"{point}:{fault}_{at[1]}@rank{at[0]}:step{step}"


def _training(fault: str, rank: int, engine: str, dtype: str, harness: Harness) -> dict[str, Any]:
    rule = _rule(fault, FAULTS[fault], rank, engine, BAD)
    skipping = make(harness, engine, f"model.dtype={dtype}", "train.nonfinite=skip")
    process = skipping.start(fault=rule)
    code = process.wait()
    if (engine, dtype) == ("zero0", "bf16"):
        assert (code, "use engine=zero1" in process.tail()) == (2, True), process.tail()
        return {"refused": True}
    assert code == 0, process.tail()
    _check_skip(skipping, fault)
    _check_report(skipping, rank, engine)
    expected = _expected(harness, dtype)
    losses = [float(row["loss"]) for row in skipping.rows() if row["step"] != BAD]
    error = max(abs(ours - one) / one for ours, one in zip(losses, expected, strict=True))
    assert error <= TOLERANCE[dtype], (losses, expected)

    stopping = make(harness, engine, f"model.dtype={dtype}")
    process = stopping.start(fault=rule)
    assert process.wait() == 3, process.tail()
    status = stopping.status()
    assert (status["exit_code"], status["state"]) == (3, "failed"), status
    assert "parameters are unchanged" in status["error"], status
    assert stopping.checkpoints() == list(range(1, BAD)), stopping.checkpoints()
    assert not (stopping.path / "model").exists()
    assert [row["step"] for row in stopping.rows()] == list(range(1, BAD + 1))
    assert _true_value(fault, stopping.rows()[-1])
    _check_report(stopping, rank, engine)
    return {"error": error, "loss": skipping.rows()[BAD - 1]["loss"]}


def _check_skip(run: Run, fault: str) -> None:
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 1, 1, 1, 1]
    assert _true_value(fault, rows[BAD - 1]), rows[BAD - 1]
    assert all(math.isfinite(float(row[name])) for row in rows if row["step"] != BAD for name in ("loss", "grad_norm"))
    assert _tensors(run, BAD) == _tensors(run, BAD - 1), "the bad step changed the state"
    assert _tensors(run, BAD + 1) != _tensors(run, BAD)
    assert _finite(run.path / "model" / "model.safetensors")
    manifest = json.loads((run.path / "checkpoints" / f"checkpoint-{STEPS}" / "MANIFEST.json").read_text())
    progress = manifest["content"]["meta"]["progress"]
    assert (progress["step"], progress["skipped"], progress["skipped_in_a_row"]) == (STEPS, 1, 0), progress


def _true_value(fault: str, row: dict[str, Any]) -> bool:
    """Whether the bad step's record says what the loss and the norm were."""
    loss = {"nan_loss": "nan", "inf_loss": "inf"}.get(fault)
    said = row["loss"] == loss if loss else isinstance(row["loss"], float)
    # DeepSpeed's low-precision check says "infinite" of a NaN too.
    return said and row["grad_norm"] in (("inf",) if fault == "overflow" else ("nan", "inf"))


def _check_report(run: Run, rank: int, engine: str) -> None:
    """Exactly the rows that were hit, the rank, and the micro-batch itself."""
    from safetensors import safe_open

    report = json.loads((run.path / "nonfinite.json").read_text())
    assert report["step"] == BAD
    hit = json.loads((run.folder / "hit.jsonl").read_text().splitlines()[-1])[1]
    assert [sample["id"] for sample in report["samples"]] == hit, (report["samples"], hit)
    assert all(sample["line"] > 0 for sample in report["samples"])
    (batch,) = report["batches"]
    at = (0, rank) if engine == "local" else (rank, 0)
    assert (batch["rank"], batch["micro_batch"]) == at, batch
    with safe_open(run.path / batch["file"], "pt") as file:
        names = set(file.keys())
        assert {"input_ids", "targets", "position_ids", "sequence_ids", "sequence_logp"} <= names, names
        assert len(file.get_tensor("sequence_logp")) == len(file.get_tensor("sequence_ids")) == 2
    assert hit[0] in str(run.status().get("error")) or run.status()["state"] == "done"


def _expected(harness: Harness, dtype: str) -> list[float]:
    """Losses of one process that skips the same step, without the skipped one."""
    known = vars(harness).setdefault("losses_with_a_skip", {})
    if dtype not in known:
        run = make(harness, "local", f"model.dtype={dtype}", "train.nonfinite=skip")
        assert run.start(fault=_rule("nan_loss", "loss", 0, "local", BAD)).wait() == 0
        known[dtype] = [float(row["loss"]) for row in run.rows() if row["step"] != BAD]
    return known[dtype]


def _tensors(run: Run, step: int) -> str:
    """A digest of the training state of a checkpoint: parameters and moments on all ranks."""
    files = sorted((run.path / "checkpoints" / f"checkpoint-{step}").rglob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _finite(path: Path) -> bool:
    from safetensors.torch import load_file

    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def _evaluation(policy: str, engine: str, harness: Harness) -> dict[str, Any]:
    run = make(harness, engine, f"train.nonfinite={policy}", f"train.eval_steps={BAD}")
    process = run.start(fault=_rule("nan_loss", "evaluation", 1, engine, BAD))
    code = process.wait()
    hit = json.loads((run.folder / "hit.jsonl").read_text().splitlines()[-1])[1]
    assert code == (3 if policy == "stop" else 0), process.tail()
    assert hit[0] in process.tail(), process.tail()
    assert f"eval_loss nan after step {BAD}" in process.tail()
    report = json.loads((run.path / "nonfinite.json").read_text())
    assert (report["eval_loss"], [sample["id"] for sample in report["samples"]]) == ("nan", hit), report
    if policy == "skip":
        said = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert [row["eval_loss"] == "nan" for row in said if "eval_loss" in row] == [False, True, False]
    return {"hit": hit}


def _reference(engine: str, harness: Harness) -> dict[str, Any]:
    run = make(harness, engine, "train.nonfinite=skip")
    own = {"ALIGNLAB_CACHE": str(run.folder / "cache")}
    rule = f"reference:nan_loss_0@rank{0 if engine == 'local' else 1}:step*"
    process = run.start(fault=rule, **own)
    assert process.wait() == 3, process.tail()
    hit = json.loads((run.folder / "hit.jsonl").read_text().splitlines()[0])[1]
    assert "reference log-probability of 1 sequence(s) is not finite" in process.tail()
    assert any(f": {one} (" in process.tail() for one in hit), process.tail()
    assert not list((run.folder / "cache").glob("reference/*")), "the bad numbers were kept"
    assert run.start(**own).wait() == 0
    return {}
