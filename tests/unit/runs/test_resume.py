"""What a checkpoint may and may not differ in from the run that goes on from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from alignlab.config import RootConfig
from alignlab.configuration import names
from alignlab.configuration.compose import compose
from alignlab.engine.checkpoint import Checkpoint
from alignlab.runs.resume import refusal

ROWS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
WORDS = (
    "model=policy",
    "data=rows.jsonl",
    "objective=dpo",
    "model.tokenizer_name_or_path=tokens",
    "data.max_length=64",
)


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "tokens", "better"):
        Path(name).mkdir()
        Path(name, "config.json").write_text(name)
    Path("rows.jsonl").write_text(ROWS)


def fields(config: RootConfig) -> dict[str, object]:
    return {**json.loads(json.dumps(names.number_keys(config))), "index": "i", "base": None}


def written(config: RootConfig) -> Checkpoint:
    return Checkpoint(Path("checkpoint-8"), 8, 2, {"progress": {}, "fields": fields(config)}, {})


def config_of(*words: str) -> RootConfig:
    return compose([*WORDS, *words]).config


CHANGES = {
    "optim.learning_rate": "optim.learning_rate=3e-4",
    "optim.name": "optim=rmsprop",
    "optim.weight_decay": "optim.weight_decay=0.1",
    "optim.warmup_ratio": "optim.warmup_ratio=0.2",
    "objective.beta": "objective.beta=0.3",
    "objective.label_smoothing": "objective.label_smoothing=0.1",
    "data.max_length": "data.max_length=32",
    "data.overlong": "data.overlong=cut",
    "model.dtype": "model.dtype=bf16",
    "model.name_or_path": "model=better",
    "reference.name_or_path": "reference.name_or_path=better",
    "train.global_batch_size": "train.global_batch_size=7",
    "train.max_steps": "train.max_steps=11",
    "train.num_train_epochs": "train.num_train_epochs=3",
    "peft.name": "peft=lora",
    "seed": "seed=5",
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_is_refused_by_name(key: str) -> None:
    text = refusal(written(config_of()), fields(config_of(CHANGES[key])), config_of(CHANGES[key]))
    assert text is not None
    assert f"{key} " in text
    assert "\n" not in text
    differing = text.partition("resume_allow=[")[2].partition("]")[0]
    assert key in differing.split(",")
    allowed = replace(config_of(CHANGES[key]), resume_allow=differing.split(","))
    assert refusal(written(config_of()), fields(config_of(CHANGES[key])), allowed) is None


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("data.path", "rows.jsonl"), ("model.name_or_path", "policy/config.json"),
        ("model.tokenizer_name_or_path", "tokens/config.json"),
    ],
)  # fmt: skip
def test_one_changed_byte_is_refused_by_name(key: str, file: str) -> None:
    before = written(config_of())
    assert refusal(before, fields(config_of()), config_of()) is None
    text = Path(file).read_text()
    Path(file).write_text(text[:-2] + "~" + text[-1])
    found = refusal(before, fields(config_of()), config_of())
    assert found is not None
    assert f"{key} {Path(file).parts[0]}#" in found


def test_another_objective_and_other_rows_are_named() -> None:
    found = refusal(written(config_of()), fields(config_of("objective=sft")), config_of("objective=sft"))
    assert found is not None
    assert "objective.name dpo, here sft" in found
    found = refusal(written(config_of()), {**fields(config_of()), "index": "j"}, config_of())
    assert found is not None
    assert "index i, here j" in found


def test_a_mistyped_permission_is_refused() -> None:
    config = replace(config_of("objective.beta=0.3"), resume_allow=["objective.beat"])
    found = refusal(written(config_of()), fields(config), config)
    assert found is not None
    assert found.startswith("resume_allow: ")
    assert "objective.beta" in found
    assert refusal(written(config_of()), fields(config_of()), config) == found  # even where nothing differs


def test_speed_keys_may_change() -> None:
    words = ("engine=zero3", "launch.nproc=4", "train.token_budget=99", "train.save_steps=3", "model.layout=packed")
    assert refusal(written(config_of()), fields(config_of(*words)), config_of(*words)) is None


def test_a_key_of_a_later_version_counts_as_its_default() -> None:
    old = written(config_of())
    del old.meta["fields"]["optim.eps"]
    assert refusal(old, fields(config_of()), config_of()) is None
    assert "optim.eps" in str(refusal(old, fields(config_of("optim.eps=1e-6")), config_of("optim.eps=1e-6")))


def test_what_no_run_wrote_is_refused() -> None:
    empty = Checkpoint(Path("checkpoint-8"), 8, 2, {}, {})
    assert "was not written by a training run" in str(refusal(empty, fields(config_of()), config_of()))
