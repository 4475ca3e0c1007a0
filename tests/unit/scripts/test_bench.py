"""The benchmark's own arithmetic: which rows both sides get, what its clocks see, what it calls void."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.config import DataConfig, ModelConfig
from alignlab.data.plan import StepPlans
from alignlab.data.prepare import prepare
from alignlab.data.sources import Needs
from alignlab.runs.job import make_encoder
from alignlab.types import Unit

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import bench
import bench_cases
import bench_report
import bench_rows
import bench_side

# ---------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------


def turns(said: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": said}]


def scored_row(number: int, ratings: tuple[int, ...]) -> dict[str, object]:
    made = [{"response": f"answer {number} {i}", "overall_score": rating} for i, rating in enumerate(ratings)]
    return {"instruction": f"question {number}", "completions": made}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder that the tiny model's tokenizer can be read from."""
    from alignlab.models import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(tiny.config(len(tiny.tokenizer())).to_json_string())
    return folder


def plans_of(file: Path, model: Path, unit: Unit, batch: int, steps: int) -> StepPlans:
    data = DataConfig(path=str(file), max_length="200")
    index = prepare(data, Needs(unit), make_encoder(ModelConfig(name_or_path=str(model)), data)[1], seed=3).index
    return StepPlans(index, unit=unit, global_batch_size=batch, seed=3, max_steps=steps)


def test_flat_rows_hold_the_same_examples_step_by_step(tmp_path, model, monkeypatch) -> None:
    """Three completions rated 3 > 2 > 1 make three pairs, two completions one, equal ones none; one row is too long."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    rows = [scored_row(n, ((3, 2, 1), (1, 2), (2, 2))[n % 3]) for n in range(15)]
    rows.insert(2, scored_row(99, (1, 5)) | {"instruction": "word " * 300})
    source = tmp_path / "rows.jsonl"
    bench_rows.write(source, rows)
    files = bench_rows.make(
        source, "reward", model, tmp_path / "out", batch=4, steps=3, max_length=200, seed=3
    )  # fmt: skip
    flat = [json.loads(line) for line in files.flat.read_text().splitlines()]
    assert len({row["id"] for row in flat}) == len(flat) == 12, "a row that is too long was replaced by another's copy"
    assert files.left_out == 6, "five without a pair and the one that is too long"
    assert all(int(row["chosen"][0]["content"][-1]) != int(row["rejected"][0]["content"][-1]) for row in flat)
    native = plans_of(files.native, model, Unit.PAIR, 4, 3)
    ours = plans_of(bench_rows.for_our_plan(files.flat, 3), model, Unit.PAIR, 4, 3)
    for step in range(3):
        of_flat = bench_side.our_examples(ours, step, False)
        assert sorted(map(repr, bench_side.our_examples(native, step, False))) == sorted(map(repr, of_flat))
        texts = [f"answer{row['chosen'][0]['content'].removeprefix('answer')}" for row in flat[4 * step : 4 * step + 4]]
        tokenizer = make_encoder(ModelConfig(name_or_path=str(model)), DataConfig())[0]
        seen = [tokenizer.decode(example[0][0]) for example in of_flat]
        assert all(text in said for text, said in zip(texts, seen, strict=True)), "not in the order of the steps"


def test_more_rows_are_looked_at_until_some_make_the_steps_exactly(tmp_path, model, monkeypatch) -> None:
    """Rows of 3 examples first cannot make 2 steps of 2; the one of 1 example comes after the 4 x 4 looked at first."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    rows = [scored_row(number, (3, 2, 1)) for number in range(10)] + [scored_row(10, (2, 1))]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = bench_rows.make(file, "reward", model, tmp_path / "made", batch=2, steps=2, max_length=200, seed=3)
    assert [json.loads(line)["id"] for line in made.native.read_text().splitlines()] == ["row-0", "row-10"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(SystemExit, match=r"10 usable rows of \[3\] examples each cannot make 2 steps of 2 exactly"):
        bench_rows.make(file, "reward", model, tmp_path / "again", batch=2, steps=2, max_length=200, seed=3)


def test_what_a_peer_has_no_form_for_is_left_out(tmp_path) -> None:
    source = tmp_path / "rows.jsonl"
    dialogue = [*turns("a"), *turns("b", "assistant"), *turns("c"), *turns("d", "assistant")]
    bench_rows.write(
        source,
        [
            {"messages": dialogue},  # two answers are targets
            {"prompt": "a", "completion": "b"},  # no turns
            {"prompt": turns("a"), "completion": turns("", "assistant")},  # nothing is said
            {"prompt": turns("a"), "completion": turns("b", "assistant")},
        ],
    )
    found = list(bench_rows.entries_of(source, Unit.SEQUENCE))
    assert [entry is None for entry in found] == [True, True, True, False]
    assert found[3].native == {"id": "row-3", "prompt": turns("a"), "completion": turns("b", "assistant")}


def test_a_row_that_would_lose_a_part_is_left_out(tmp_path) -> None:
    """One of three answers is empty: we would train on the pair of the others, a peer on all three."""
    rows = [scored_row(1, (3, 2, 1)), scored_row(2, (3, 2, 1))]
    rows[1]["completions"][0]["response"] = " "  # type: ignore[index]
    bench_rows.write(tmp_path / "rows.jsonl", rows)
    found = list(bench_rows.entries_of(tmp_path / "rows.jsonl", Unit.PAIR))
    assert len(found[0].flat) == 3
    assert found[1] is None


def test_examples_are_counted_exactly() -> None:
    """Rows of 3, 3, 2 examples: 5 are the first and the third, 4 cannot be had."""
    rows = [bench_rows.Entry({"id": n}, [{}] * size) for n, size in enumerate((3, 3, 2))]
    assert bench_rows.exactly(rows, 5) == [rows[0], rows[2]]
    assert bench_rows.exactly(rows, 4) is None


def test_both_sides_describe_an_example_alike() -> None:
    """One pair: prompt 1 2, answers 3 and 4 5.  A packed row: 1 2 3 and 4 5, of which 3 and 5 are targets."""
    dpo = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    no, yes = False, True
    assert bench_side.trl_examples(dpo, "DPO") == [[([1, 2, 3], [no, no, yes]), ([1, 2, 4, 5], [no, no, yes, yes])]]
    sft = {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}
    assert bench_side.trl_examples(sft, "SFT") == [[([1, 2, 3], [no, no, yes])]]
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, -100, 5], "seq_lengths": [3, 2]}
    assert bench_side.trl_examples(packed, "SFT") == [[([1, 2, 3], [no, no, yes])], [([4, 5], [no, yes])]]
    reward = {"chosen_ids": [1, 3], "rejected_ids": [1, 4, 5]}
    assert bench_side.trl_examples(reward, "Reward") == [[([1, 3], [no, no]), ([1, 4, 5], [no, no, no])]]


def test_steps_are_equal_in_any_order_within_a_step() -> None:
    a, b, c = ([([n], [True])] for n in range(3))
    one, other = (bench_side.of_steps(iter(steps)) for steps in ([[a, b], [c]], [[b, a], [c]]))
    assert one == other | {"lengths": one["lengths"]}
    moved = bench_side.of_steps(iter([[a, c], [b]]))
    assert moved["steps"] != one["steps"]
    assert moved["all"] == one["all"] != bench_side.of_steps(iter([[a, b], [b]]))["all"]
    assert (one["supervised_tokens"], one["sequences"]) == (3, 3)


# ---------------------------------------------------------------------------------------------------------------
# Clocks
# ---------------------------------------------------------------------------------------------------------------

BURN = """
import sys, time
while time.process_time() < 0.3: pass
print("burnt", flush=True)
sys.stdin.read()
"""


def test_the_clock_sees_children_that_are_still_alive() -> None:
    """A child computes 0.3 s and waits; before and after its end its seconds are ours."""
    clock = bench_side.Clock()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"burnt\n"
        alive = clock.read()["cpu"]
    assert alive >= 0.25
    assert clock.read()["cpu"] >= alive


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset through /proc")
def test_the_peak_is_that_since_the_reset() -> None:
    """300 MB before the reset are not seen, 100 MB after it are."""
    import numpy as np

    np.ones(300_000_000, dtype=np.uint8)
    before = bench_side.reset_peak()
    np.ones(100_000_000, dtype=np.uint8)
    assert 90 < bench_side.peak() - before < 200


# ---------------------------------------------------------------------------------------------------------------
# The result
# ---------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "objective": "dpo", "batch": 4, "steps": 2, "dtype": "fp32", "model": "tiny", "layers": None, "data": "rows",
    "against": "trl", "trl": "best", "cached": "none", "micro_batch": None,
}  # fmt: skip


def a_run(cpu: float, peak: float = 100.0, losses: tuple[float, ...] = (0.7, 0.6), steps: tuple[str, ...] = ("a", "b")):
    return {
        "whole": {"cpu": cpu, "wall": cpu / 2}, "train": {"cpu": cpu / 2, "wall": cpu / 4}, "peak_mib": peak,
        "losses": list(losses), "steps": list(steps), "all": "".join(sorted(steps)), "supervised_tokens": 80,
        "flops": 3e9, "threads": 2,
    }  # fmt: skip


def report_of(first, second, **settings):
    return bench_report.report(
        SETTINGS | settings, ("alignlab", "trl"), {"alignlab": first, "trl": second}, rates=[2e9, 1e9, 4e9], gpu=False,
        search=[], second_settings={}, command="scripts/bench.py",
        machine={"gpu": False, "device": "x", "cores": 2, "threads": 2, "versions": {}, "date": "2026-01-01"},
    )  # fmt: skip


def test_ratios_are_taken_pair_by_pair() -> None:
    """10, 20, 30 s against 30, 40, 150 s: 3, 2, 5 times less, though the medians' ratio is 2.  Peaks: ours / theirs."""
    first = [a_run(10, 40), a_run(20, 40), a_run(30, 40)]
    found = report_of(first, [a_run(30, 80), a_run(40, 100), a_run(150, 160)])
    assert found["void"] is None
    assert found["ratios"]["whole"] == {"min": 2, "median": 3, "max": 5, "pairs": [3, 2, 5]}
    assert found["ratios"]["peak"]["pairs"] == [0.5, 0.4, 0.25]


def test_rates_by_hand() -> None:
    """8 examples, 80 targets; 20 cpu s and 10 s in all, 10 and 5 in the steps; 3 GFLOP at 2 GFLOP/s (the median)."""
    found = report_of([a_run(20)], [a_run(20)])["summary"]["alignlab"]
    assert found["samples_per_second"] == 0.8
    assert found["supervised_tokens_per_second"] == 8
    assert found["cpu_seconds_per_sample"] == 2.5
    assert found["mfu"] == pytest.approx(3e9 / 5 / 2e9)
    assert found["mfu_cpu"] == pytest.approx(3e9 / (10 / 2) / 2e9)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (a_run(1, losses=(0.7, 0.6 * (1 + 5e-5))), None),
        (a_run(1, losses=(0.7, 0.6 * (1 + 5e-4))), "losses differ by 5.0e-04"),
        (a_run(1, losses=(0.7, float("nan"))), "losses differ by nan"),
        (a_run(1, losses=(0.7,)), "1 steps were taken in place of 2"),
        (a_run(1, steps=("a", "c")), "do not hold the same token ids"),
    ],
)
def test_what_is_void(second, why) -> None:
    found = report_of([a_run(1)], [second])
    if why is None:
        assert found["void"] is None
        assert "| equal |" in bench_report.table([found])
    else:
        assert why in found["void"]
        assert f"void: {found['void']}" in bench_report.table([found])


def test_packed_rows_are_compared_as_a_whole() -> None:
    """Three steps of other rows, other losses; but no other row."""
    theirs = a_run(1, losses=(0.9, 0.8, 0.7), steps=("b", "a"))
    found = report_of([a_run(1)], [theirs], trl="packed")
    assert found["void"] is None
    assert "| other rows in a step |" in bench_report.table([found])
    assert "same token ids" in report_of([a_run(1)], [a_run(1, steps=("a", "c"))], trl="packed")["void"]


def test_another_loss_by_design_still_has_to_repeat_itself() -> None:
    other = a_run(1, losses=(0.5, 0.4))
    assert report_of([a_run(1)] * 2, [other, other], objective="ift")["void"] is None
    drifting = a_run(1, losses=(0.5, 0.3))
    assert "losses differ" in report_of([a_run(1)] * 2, [other, drifting], objective="ift")["void"]


# ---------------------------------------------------------------------------------------------------------------
# TRL's best settings
# ---------------------------------------------------------------------------------------------------------------


def test_candidates_are_what_a_careful_user_tries(monkeypatch) -> None:
    found = list(bench_cases.candidates("dpo", 12, None, gpu=False))
    assert [micro for micro, _ in found] == [1, 2, 4], "8 does not divide 12"
    assert all(s == {"gradient_checkpointing": False, "precompute_ref_log_probs": True} for _, s in found)
    monkeypatch.setattr(bench_cases.util, "find_spec", lambda name: object())
    on_gpu = [settings for _, settings in bench_cases.candidates("sft", 8, 8, gpu=True)]
    assert {"gradient_checkpointing": False} in on_gpu
    assert any(s.get("use_liger_kernel") and s.get("padding_free") and "model_init_kwargs" in s for s in on_gpu)


class Machine:
    """Runs that cost what the table says; a missing entry fails."""

    def __init__(self, cost: dict[int, float]) -> None:
        self.cost = cost
        self.arguments = argparse.Namespace(objective="dpo", batch=8, micro_batch=None, search_steps=2, steps=6)

    def run(self, side, steps):
        if side.micro_batch not in self.cost:
            raise RuntimeError("out of\nmemory")
        cpu = self.cost[side.micro_batch]
        clocks = {"whole": {"cpu": cpu, "wall": 100 - cpu}, "train": {"cpu": cpu / 2, "wall": 1.0}}
        return {**clocks, "peak_mib": 1.0}


def test_the_cheapest_settings_are_taken_and_failures_are_said() -> None:
    side = bench_cases.Side("trl", "trl", "dpo", Path("r"), Path("w"), {}, {}, 8)
    chosen, tried = bench_cases.search(Machine({1: 9.0, 2: 5.0, 4: 7.0}), side, gpu=False)
    assert chosen.micro_batch == 2
    assert chosen.trl == {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    # Of 9 s half were two steps; all six cost 4.5 s before them and 3 x 4.5 s.
    assert [entry.get("seconds") for entry in tried] == [18.0, 10.0, 14.0, None]
    assert tried[3]["failed"] == "memory"
    said = bench_report.searched(report_of([a_run(1)], [a_run(1)]) | {"search": tried})
    assert said == "; search by micro-batch 1: 18 s, 2: 10 s, 4: 14 s, 8: memory"
    on_gpu, _ = bench_cases.search(Machine({1: 9.0, 2: 5.0}), side, gpu=True)
    assert on_gpu.micro_batch == 1, "there wall seconds count"
    with pytest.raises(SystemExit, match="none of TRL's settings runs"):
        bench_cases.search(Machine({}), side, gpu=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--objective", "dpo"],
        ["--data", "x.jsonl"],
        ["--objective", "kto", "--data", "x.jsonl"],
        ["--objective", "ift", "--data", "x.jsonl", "--against", "trl"],
        ["--objective", "tree", "--data", "x.jsonl", "--cached", "both"],
        ["--objective", "dpo", "--data", "x.jsonl", "--trl", "packed"],
    ],
)
def test_what_does_not_go_together_is_refused(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.parse(arguments)
    assert stop.value.code == 2


def test_a_command_shows_no_folder() -> None:
    assert bench.shown("/home/me/rows.jsonl.gz") == "rows.jsonl.gz"
    assert bench.shown("--objective") == "--objective"


@pytest.mark.nightly
@pytest.mark.parametrize("objective", ["sft", "dpo", "reward"])
def test_both_sides_train_the_same(objective, tmp_path) -> None:
    """The whole of it, on the tiny model: the same ids in the same steps, and equal losses after updates."""
    pytest.importorskip("trl")
    rows = [
        {
            "prompt": turns(f"How many coins has Tom, if he finds {n} more than {n % 7}?"),
            "chosen": turns(f"He has {n + n % 7}." + " So it is." * (n % 5), "assistant"),
            "rejected": turns(f"He has {n} coins.", "assistant"),
        }
        for n in range(1, 40)
    ]
    bench_rows.write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.json"
    arguments = (
        f"--objective {objective} --model tiny --data {tmp_path}/rows.jsonl --trl defaults --pairs 1 --batch 8"
        f" --steps 2 --learning-rate 1e-3 --threads 1 --json {out}"
    )
    subprocess.run([sys.executable, str(bench.HERE / "bench.py"), *arguments.split()], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["void"] is None
    ours, theirs = found["runs"]["alignlab"][0], found["runs"]["trl"][0]
    assert ours["steps"] == theirs["steps"]
    assert ours["losses"][0] != ours["losses"][1]
    assert ours["flops"] <= theirs["flops"]
