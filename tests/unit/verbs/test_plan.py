"""``alignlab plan``: what it says is what a run then does."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.engine.local import LocalEngine
from alignlab.models.flops import ModelFlops
from alignlab.types import Ask, PackedBatch
from alignlab.verbs import plan

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def common(small_model: Path) -> list[str]:
    """Three steps of four examples, in several micro-batches each; nothing is held out."""
    return [
        f"model={small_model}", "data=sums", "data.options={rows: 11}", "data.eval_path=null", "train.max_steps=3",
        "train.global_batch_size=4", "train.token_budget=200", "resume=never", "overwrite=true", "run.name=seen",
    ]  # fmt: skip


class Seen:
    """What an engine was asked: (a gradient is recorded, tokens, scored rows, operations) of every call, by step."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[bool, int, int, float]]] = [[]]
        self.backwards = [0]

    def of_steps(self, names: int) -> list[float]:
        return [sum(call[names] for call in step if call[0]) for step in self.calls[:-1]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    score, backward, step = LocalEngine.score, LocalEngine.backward, LocalEngine.step

    def scoring(self: Any, batch: PackedBatch, ask: Ask) -> Any:
        grad = torch.is_grad_enabled()
        rows = batch.last if ask.want == "reward" else batch.scored
        work = ModelFlops.of(self.module.model).of_batch(batch, ask, grad).item()
        found.calls[-1].append((grad, batch.input_ids.numel(), rows.numel(), work))
        return score(self, batch, ask)

    def going_back(self: Any, loss: Any, last: bool = False) -> None:
        found.backwards[-1] += 1
        backward(self, loss, last)

    def stepping(self: Any, lr: float) -> Any:
        found.calls.append([])
        found.backwards.append(0)
        return step(self, lr)

    monkeypatch.setattr(LocalEngine, "score", scoring)
    monkeypatch.setattr(LocalEngine, "backward", going_back)
    monkeypatch.setattr(LocalEngine, "step", stepping)
    return found


def logged(home: Path) -> list[dict[str, Any]]:
    lines = (home / "runs" / "seen" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "tokens_per_second" in row]


def check_logs(plan: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Steps, tokens of each and their operations: work over tokens is the ratio of two rates over the same seconds."""
    sums = plan["steps"]["sum"]
    assert [row["step"] for row in rows] == plan["steps"]["counted"] == [1, 2, 3]
    assert rows[-1]["num_tokens"] == sums["tokens"]["total"]
    assert rows[-1]["epoch"] == plan["steps"]["epochs"]
    tokens = [b - a for a, b in zip([0, *(row["num_tokens"] for row in rows)], [r["num_tokens"] for r in rows])]  # noqa: B905
    work = [row["tflops"] * 1e12 / row["tokens_per_second"] * n for row, n in zip(rows, tokens, strict=True)]
    assert max(tokens) == plan["steps"]["a_step"]["tokens"]["most"]
    assert max(work) == pytest.approx(plan["steps"]["a_step"]["flops"]["most"], rel=1e-9)
    assert sum(work) == pytest.approx(plan["flops"]["training"]["total"], rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        ["objective=dpo"],
        ["objective=dpo", "peft=lora", "model.layout=rows"],
        ["objective=kto"],
        ["objective=ift", "train.token_budget=120"],
        pytest.param(["objective=reward"], marks=pytest.mark.nightly),
    ],
    ids=" ".join,
)
def test_a_run_does_what_was_planned(run: Run, home: Path, seen: Seen, common: list[str], settings: list[str]) -> None:
    words = [*common, "engine=local", *settings]
    plan = run("plan", *words, "--json").json
    assert seen.calls == [[]], "the model was asked something"
    assert run("train", *words).code == 0
    check_logs(plan, logged(home))
    a_step, sums = plan["steps"]["a_step"], plan["steps"]["sum"]
    assert a_step["micro_batches"]["most"] == max(seen.backwards) > 1
    assert sums["scored"]["total"] == sum(seen.of_steps(2))
    assert sums["computed"]["total"] == sum(seen.of_steps(1))
    if "objective=kto" not in settings:  # its mismatched rows may be the larger ones
        assert a_step["largest"]["most"] == max(call[1] for step in seen.calls for call in step if call[0])
    # Everything that the model was asked, statistics and the reference pass included.
    everything = sum(call[3] for step in seen.calls for call in step)
    flops = plan["flops"]
    assert everything == pytest.approx(flops["training"]["total"] + flops["reference"]["total"], rel=1e-12)
    assert (flops["reference"]["total"] > 0) == (settings[0] in ("objective=dpo", "objective=kto"))


def test_two_ranks_log_what_was_planned(run: Run, home: Path, common: list[str]) -> None:
    words = [*common, "objective=dpo", "engine=zero2", "launch.nproc=2", "launch=torchrun"]
    plan = run("plan", *words, "--json").json
    assert (plan["engine"], plan["ranks"]) == ("zero2", 2)
    assert run("train", *words).code == 0
    rows = logged(home)
    check_logs(plan, rows)
    for name, key in (("filler_share", "filler_share"), ("imbalance", "rank_imbalance")):
        assert plan["steps"]["a_step"][name]["mean"] == pytest.approx(sum(row[key] for row in rows) / 3)


def test_a_sample_of_steps(run: Run, common: list[str]) -> None:
    words = [*common, "objective=dpo", "train.max_steps=30"]
    some = run("plan", *words, "steps=6", "--json").json
    all_of_them = run("plan", *words, "steps=0", "--json").json
    assert len(some["steps"]["counted"]) == 6
    assert some["steps"]["counted"][-1] == 30 == len(all_of_them["steps"]["counted"])
    guess, truth = some["flops"]["training"], all_of_them["flops"]["training"]
    assert truth["error"] == 0 < guess["error"]
    assert abs(guess["total"] - truth["total"]) < 4 * guess["error"]
    answer = run("plan", *words, "steps=6")
    assert "(6 of them counted, seed 0)" in answer.out
    assert " ± " in answer.out


def test_hours_and_dollars(run: Run, common: list[str]) -> None:
    words = [*common, "objective=dpo", "launch.nproc=4", "engine=zero3"]
    found = run("plan", *words, "gpu=H100", "mfu=0.5", "dollars_per_gpu_hour=2", "--json").json
    work = found["flops"]["training"]["total"] + found["flops"]["reference"]["total"]
    assert found["dtype"] == "bfloat16"
    assert found["cost"]["gpu_hours"] == pytest.approx(work / (0.5 * 989e12) / 3600)
    assert found["cost"]["hours"] == pytest.approx(found["cost"]["gpu_hours"] / 4)
    assert found["cost"]["dollars"] == pytest.approx(2 * found["cost"]["gpu_hours"])
    assert run("plan", *words, "--json").json["cost"] is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.max_step=3"], "unknown key 'train.max_step'"),
        (["gpu=V100"], "gpu: V100 is not known; known are A100, "),
        (["mfu=0.4"], "mfu: says nothing without gpu=NAME"),
        (["gpu=H100", "mfu=40"], "mfu=40: a share of the published rate, above 0 and at most 1"),
        (["gpu=H100", "mfu=much"], "mfu: much (expected a number)"),
        (["gpu=H100", "model.dtype=fp32"], "gpu=H100: its published rate is that of bf16, and model.dtype is float32"),
        (["steps=-1"], "steps=-1: a number of steps, or 0 for all"),
        (["engine=zero0", "model.dtype=bf16"], "use engine=zero1"),
        (["optim.alpha=0.5"], "optim.alpha: set on the command line, but nothing reads it with optim=adamw"),
        (["data=nowhere.jsonl"], "data.path: no such file or folder: nowhere.jsonl"),
    ],
)
def test_a_line_for(run: Run, common: list[str], settings: list[str], says: str) -> None:
    answer = run("plan", *common, "objective=dpo", *settings)
    assert answer.code == 2
    assert says in answer.err
    assert len(answer.err.splitlines()) == 1


PAGE = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
EXAMPLES = [line for line in re.findall(r"^    alignlab (.*)$", PAGE, re.M) if "model=tiny" in line]


@pytest.mark.parametrize("words", EXAMPLES)
def test_the_page_s_examples(run: Run, words: str) -> None:
    answer = run(*shlex.split(words))
    assert answer.code == 0, answer.err
    heads = [line.split()[0] for line in answer.out.splitlines() if not line.startswith(" ")]
    assert heads[:7] == ["plan", "for", "model", "data", "steps", "memory", "work"]
    assert not Path("runs/planned").exists()


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.46 / 3600, "0.46 seconds"), (59.9 / 3600, "59.9 seconds"), (0.5, "30 minutes"), (36, "36 hours")],
)
def test_durations_in_the_unit_that_reads_best(hours: float, text: str) -> None:
    assert plan._duration(hours) == text
