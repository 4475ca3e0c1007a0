"""What a user gets wrong ends in exit code 2 and one line that says what to do, with nothing left half-made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

Run = Callable[..., Any]
PROMPT = [{"role": "user", "content": "Hi"}]
PAIR = {
    "prompt": PROMPT, "chosen": [{"role": "assistant", "content": "Ho"}],
    "rejected": [{"role": "assistant", "content": "He"}],
}  # fmt: skip
DEMONSTRATION = {"messages": [*PROMPT, {"role": "assistant", "content": "Ho"}]}
TOKENS = {"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 6, 8], "prompt_length": 2}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(home: Path, small_model: Path) -> Path:
    """Rows and models, each with one thing wrong."""
    write(home / "good.jsonl", PAIR, {**PAIR, "prompt": [{"role": "user", "content": "Ha"}]})
    write(home / "broken.jsonl", PAIR, '{"prompt": [,')
    write(home / "keyless.jsonl", PAIR, {**PAIR, "rejected": 3})
    write(home / "identical.jsonl", {**PAIR, "rejected": PAIR["chosen"]})
    write(home / "empty.jsonl")
    completions = [{"response": "Ho", "overall_score": 5}, {"response": "He", "overall_score": 3}]
    write(home / "overall.jsonl", {"instruction": "Hi", "completions": completions})
    write(home / "unknown.jsonl", {"question text": "Hi", "reply": "Ho"})
    write(home / "demonstrations.jsonl", DEMONSTRATION, DEMONSTRATION)
    write(home / "tokens.jsonl", TOKENS, TOKENS)
    shutil.copytree(small_model, home / "no tokenizer")
    shutil.copytree(small_model, home / "no template")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (home / "no tokenizer" / name).unlink()
    (home / "no template" / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(home / "no template").chat_template is None
    (home / "nothing").mkdir()
    _state_space_model(home / "mamba")
    return home


def _state_space_model(folder: Path) -> None:
    """It carries state, which leaks from row to row of a packed line."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)).save_pretrained(folder)


CASES: dict[str, tuple[list[str], list[str]]] = {
    "missing file": (["data=missing.jsonl"], ["missing.jsonl", "no such file"]),
    "malformed row": (["data=broken.jsonl"], ["broken.jsonl", "2"]),
    "wrong type": (["data=keyless.jsonl"], ["keyless.jsonl", "2", "rejected"]),
    "no row left": (["data=identical.jsonl"], ["identical.jsonl", "no row is left", "identical_pair 1"]),
    "empty file": (["data=empty.jsonl"], ["empty.jsonl"]),
    "ratings that cannot be conditions": (
        ["data=overall.jsonl", "objective=cpo"],
        ["overall.jsonl", "rated by overall", "needs a rating besides 'overall'", "annotations", "[overall]"],
    ),
    "unknown columns": (["data=unknown.jsonl"], ["unknown.jsonl", "question text"]),
    "wrong kind": (["data=demonstrations.jsonl"], ["demonstrations.jsonl", "1", "chosen"]),
    "no template": (["data=good.jsonl", "model=no template"], ["chat_template"]),
    "no tokenizer": (["data=good.jsonl", "model=no tokenizer"], ["tokenizer"]),
    "no model": (["data=good.jsonl", "model=./elsewhere"], ["./elsewhere"]),
    "an empty model folder": (["data=good.jsonl", "model=nothing"], ["nothing", "config.json"]),
    "unknown key": (["data=good.jsonl", "optim.learning_rat=1"], ["optim.learning_rat", "optim.learning_rate"]),
    "key of elsewhere": (["data=good.jsonl", "beta=0.2"], ["objective.beta"]),
    "unknown option": (["data=good.jsonl", "optim=adamv"], ["adamv", "adamw"]),
    "unknown objective": (["data=good.jsonl", "objective=dop"], ["dop", "dpo"]),
    "layout that is not exact": (["data=tokens.jsonl", "model=mamba", "model.layout=packed"], ["model.layout=packed"]),
    "bf16 with zero0": (["data=good.jsonl", "engine=zero0", "model.dtype=bf16"], ["zero0", "zero1"]),
    "fp64 with zero": (["data=good.jsonl", "engine=zero2", "model.dtype=fp64"], ["fp64", "local"]),
    "template that is missing": (["data=good.jsonl", "model.chat_template=missing.jinja"], ["missing.jinja"]),
    "no text to answer": (
        ["data=tokens.jsonl", "eval.generate=2", "data.eval_path=tokens.jsonl", "data.leaks=keep"],
        ["prompt"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_2_and_a_correct_start_afterwards(run: Run, files: Path, settings: list[str], case: str) -> None:
    words, hints = CASES[case]
    name = case.replace(" ", "-")
    given = {word.partition("=")[0] for word in words}
    kept = [w for w in settings if w.partition("=")[0] not in given and not w.startswith("data")]
    answer = run("train", *kept, *words, "train.max_steps=1", "train.global_batch_size=1", f"run.name={name}")
    assert answer.code == 2, answer
    assert answer.err.startswith("alignlab: ")
    assert answer.err.count("\n") == 1, answer.err
    for hint in hints:
        assert hint in answer.err
    assert "Traceback" not in answer.out + answer.err
    folder = files / "runs" / name
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model").exists()
    assert not list(files.glob("cache/*/.*/"))  # no half-made entry
    right = [w for w in settings if not w.startswith("data")]
    answer = run("train", *right, "data=good.jsonl", "train.max_steps=1", "train.global_batch_size=1",
                 f"run.name={name}")  # fmt: skip
    assert answer.code == 0, answer.err
    assert (folder / "model" / "config.json").is_file()


def test_all_mistakes_of_a_command_are_told_together(run: Run, settings: list[str]) -> None:
    answer = run("train", *settings, "optim.learning_rat=1", "train.max_step=3", "seed=x")
    assert answer.code == 2
    assert [line.startswith("alignlab: ") for line in answer.err.splitlines()] == [True] * 3
    for name in ("optim.learning_rate", "train.max_steps", "seed"):
        assert name in answer.err


def test_faulty_rows_are_counted_and_listed(run: Run, files: Path, settings: list[str]) -> None:
    """One pair of three has the same answer twice: the run goes on, and says which row was left out and why."""
    write(files / "mixed.jsonl", PAIR, {**PAIR, "rejected": PAIR["chosen"]}, PAIR)
    words = [w for w in settings if not w.startswith("data")]
    answer = run("train", *words, "data=mixed.jsonl", "train.max_steps=1", "run.name=mixed")
    assert "3 read = 2 kept + 1 dropped (identical_pair 1: data/rejected.jsonl)" in answer.out
    rejected = [json.loads(line) for line in (files / "runs/mixed/data/rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == [(2, "identical_pair")]


def test_unreadable_rows_may_be_allowed(run: Run, files: Path, settings: list[str]) -> None:
    words = [w for w in settings if not w.startswith("data")]
    allowed = run("train", *words, "data=broken.jsonl", "data.max_reject_fraction=0.5", "train.max_steps=1",
                  "train.global_batch_size=1", "run.name=allowed")  # fmt: skip
    assert allowed.code == 0
    assert "2 read = 1 kept + 1 dropped (not_json 1" in allowed.out
    stopped = run("train", *words, "data=broken.jsonl", "data.max_reject_fraction=0.4", "run.name=refused")
    assert stopped.code == 2
    assert "data.max_reject_fraction=0.4 allows 0" in stopped.err  # floor(0.4 x 2)


def test_numbers_that_are_not_finite_exit_3(run: Run, files: Path, settings: list[str]) -> None:
    words = ["optim.learning_rate=1e30", "optim.warmup_ratio=0", "run.name=infinite"]
    answer = run("train", *settings, *words)
    assert answer.code == 3
    assert answer.err.count("\n") == 1
    assert "step 2" in answer.err  # the first update is of finite numbers, the second step of its wreck
    status = json.loads((files / "runs/infinite/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    found = json.loads((files / "runs/infinite/nonfinite.json").read_text())
    assert found["step"] == 2
    assert len(found["samples"]) == 4
