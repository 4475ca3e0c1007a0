"""Run names: the same numbers give the same name anywhere; another number gives another."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from alignlab.configuration import names, schema
from alignlab.configuration.checks import RUN_NAME
from alignlab.configuration.compose import compose
from alignlab.errors import ConfigError

BASE = ["objective=dpo", "model=tiny", "data=sums"]


def name(*tokens: str) -> str:
    return names.run_name(compose([*BASE, *tokens]).config)


def test_the_form() -> None:
    assert re.fullmatch(r"dpo-tiny-sums-[0-9a-f]{8}", name())
    assert name("model=Qwen/Qwen3-8B").startswith("dpo-qwen3-8b-sums-")
    assert name("model=data/sft-first/model/", "data=My Rows (v2)").startswith("dpo-sft-first-my-rows-v2-")
    assert RUN_NAME.fullmatch(name("model=Org/" + "x" * 300, "data=" + "é" * 200))
    assert name("run.name=mine") == "mine"


SPEED = [
    "engine=zero3", "engine.timeout=5", "launch=torchrun", "launch.nproc=8", "logger=[jsonl,wandb]",
    "model.layout=rows", "model.use_liger_kernel=true", "train.torch_compile=true",
    "train.token_budget=100", "train.per_device_train_batch_size=1", "train.gradient_checkpointing=true",
    "train.eval_steps=3", "train.save_steps=3", "train.save_total_limit=1", "train.export_steps=5",
    "train.logging_steps=7", "output_dir=elsewhere", "resume=never", "overwrite=true", "data.merge_prompts=true",
    "engine.offload_optimizer=false", "eval.batch_size=2", "reference=true",
]  # fmt: skip


@pytest.mark.parametrize("token", SPEED)
def test_speed_keys_do_not_count(token: str) -> None:
    assert name(token) == name()


def test_every_other_key_counts() -> None:
    config = compose(BASE).config
    flat = schema.flatten(config)
    counted = names.stated_keys(config)
    spared = set(flat) - set(counted)
    assert {"objective.beta", "optim.learning_rate", "seed", "train.global_batch_size", "data.max_length"} <= set(
        counted
    )
    assert all(names.is_speed(key) or key in ("data.merge_prompts", "data.leaks") for key in spared)
    base = names.digest(counted)
    for key in counted:
        assert names.digest({**counted, key: "another value"}) != base
    for token in ("objective.beta=0.2", "seed=1", "data.overlong=cut", "data.limit=5", "optim=rmsprop"):
        assert name(token) != name()


def test_files_count_by_contents_and_base_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (one / "rows.jsonl").write_text('{"a": 1}\n')
    shutil.copy(one / "rows.jsonl", two / "rows.jsonl")
    absolute = name(f"data={one / 'rows.jsonl'}")
    assert name(f"data={two / 'rows.jsonl'}") == absolute
    monkeypatch.chdir(two)
    assert name("data=rows.jsonl") == name("data=./rows.jsonl") == absolute
    (two / "rows.jsonl").write_text('{"a": 2}\n')
    assert name("data=rows.jsonl") != absolute
    mixed = "data.sources=[{path: rows.jsonl, weight: 2}]"
    before = name("data.path=null", mixed)
    (two / "rows.jsonl").write_text('{"a": 3}\n')
    assert name("data.path=null", mixed) != before


def test_model_folders_count_by_their_files(tmp_path: Path) -> None:
    folder = tmp_path / "first" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    with weights.open("wb") as stream:
        stream.truncate(names.WHOLE_FILE + 1000)
    before = name(f"model={folder}")
    assert before.startswith("dpo-first-")
    with weights.open("r+b") as stream:
        stream.seek(0)
        stream.write(b"changed")
    assert name(f"model={folder}") != before


@pytest.mark.parametrize(
    "bad",
    [
        "..", ".", "../x", "/abs", "a/b", "a\\b", "", " ", "a b", "a\nb", "a\x00b", "x" * 65, "é", "ａ",
        "-a", "_a", ".a", "a.",
        "~", "$HOME", "%2e", "a:b", "a*", "CON|", "a;b", "`a`", "{a}", "a,b", "a=b", "'a'b", "#a", "a\t", "​a", "a?",
    ],
)  # fmt: skip
def test_names_that_could_leave_the_folder_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        compose(BASE, values={"run.name": bad})
