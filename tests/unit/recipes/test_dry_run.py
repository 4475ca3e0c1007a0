"""Two small steps of any configuration: what is kept as set, what is made up, and what is found out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from alignlab.config import ConditionConfig, RootConfig
from alignlab.configuration.compose import compose
from alignlab.models import fourbit
from alignlab.recipes.dry_run import dry_run, rated_rows


def configured(*tokens: str) -> RootConfig:
    return compose(tokens, needs=("model", "data", "objective")).config


def test_a_recipe_of_two_stages_with_conditions(tmp_path: Path) -> None:
    """CPSFT, then CPO with an adapter, as the paper has it: the second starts from what the first exported."""
    cache = os.environ.get("ALIGNLAB_CACHE")
    first = dry_run(
        configured(
            "objective=cpsft", "model=tiny", "data=cpo", "engine=zero3",
            "engine.offload_optimizer=true", "optim.warmup_steps=0", "optim.learning_rate=0.01",
        ),
        tmp_path / "cpsft",
    )  # fmt: skip
    assert first.model == "tiny"
    assert len(first.losses) == 2
    assert all(norm > 0 for norm in first.grad_norms)
    peft = "qlora" if fourbit.installed() else "lora"
    second = dry_run(
        configured(
            "objective=cpo", "model=anything", "data=cpo", f"peft={peft}", "peft.lora_r=4",
            "peft.lora_target_modules=q_proj,k_proj", "optim.warmup_steps=0", "optim.learning_rate=0.01",
        ),
        tmp_path / "cpo", first.folder,
    )  # fmt: skip
    assert second.losses[0] == pytest.approx(0.6931472, abs=1e-5)  # -log s(0): policy and reference are the same
    assert second.losses[1] != second.losses[0]  # no warm-up: the first update shows in the second step
    adapter = second.folder.with_name("adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as stored:
        assert {name.split(".")[-3] for name in stored.keys()} == {"q_proj", "k_proj"}  # noqa: SIM118
    assert os.environ.get("ALIGNLAB_CACHE") == cache
    assert "warmup" not in (tmp_path / "cpo" / "log.txt").read_text()


def test_made_up_rows_satisfy_every_bucket() -> None:
    levels: dict[str, Any] = {"helpfulness": [1.0, 2.0, 3.0], "harmlessness": [0.0, 1.0]}
    buckets = [{"condition": {"helpfulness": 3}}, {"condition": {"harmlessness": 0, "helpfulness": "any"}}]
    rows = list(rated_rows(ConditionConfig(levels=levels, buckets=buckets)))
    assert len(rows) == 4
    for number, row in enumerate(rows):
        ratings = [
            {name: float(mark["Rating"]) for name, mark in answer["annotations"].items()}
            for answer in row["completions"]
        ]
        assert all(set(rating) == set(levels) and all(rating[n] in levels[n] for n in levels) for rating in ratings)
        name, level = ("helpfulness", 3.0) if number % 2 == 0 else ("harmlessness", 0.0)
        assert ratings[0][name] == level
