"""Every recipe at the papers' scale: composed, validated, and (nightly) tried for two steps."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest

from alignlab.data.chat import Chat
from alignlab.models import tiny
from alignlab.recipes import shelf
from alignlab.recipes.dry_run import dry_run_stages
from alignlab.recipes.plan import Case, Planned, plan
from alignlab.recipes.reading import read
from alignlab.validation import validate

RECIPES = [name for name in shelf.names() if "paper" in shelf.scales(shelf.find(name))]


@cache
def planned(name: str) -> dict[str, Planned]:
    """The stages; nothing is written where they would be done."""
    return plan(Case(read(shelf.find(name), "paper"), 0), Path("reproductions"))


def test_there_are_recipes() -> None:
    assert {"cpo", "eurus", "ift", "ultrafeedback", "ultramedical"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_it_composes_and_nothing_is_wrong_with_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    stages = planned(name)
    for stage in stages.values():
        if stage.request is None:
            continue
        assert validate(stage.request).problems == []
        config = stage.request.config
        assert config.engine.name == "zero3" or config.launch.gpus_per_node == 1
        assert config.launch.gpus_per_node is not None
        assert config.launch.time
    scale = read(shelf.find(name), "paper")
    assert scale.metrics
    assert all(metric.published for metric in scale.metrics.values())
    assert scale.seconds is None  # nobody has measured it


def test_the_published_settings_arrive() -> None:
    """What papers and released code state, read off the composed configurations."""
    ift = planned("ift")["ift"].request
    assert ift is not None
    config = ift.config
    assert (config.optim.name, config.optim.learning_rate, config.optim.warmup_ratio) == ("rmsprop", 5e-7, 0.1)
    assert (config.train.global_batch_size, config.train.num_train_epochs) == (512, 3)
    assert (config.objective.max_lambda, config.objective.gamma) == (0.2, 0.95)
    stages = planned("cpo")
    first, second = stages["cpsft"].request, stages["cpo"].request
    assert first is not None
    assert second is not None
    assert first.config.engine.name == "zero3"
    assert first.config.engine.offload_optimizer
    assert first.config.train.global_batch_size == 2048
    assert (second.config.peft.name, second.config.peft.lora_r, second.config.peft.lora_alpha) == ("qlora", 64, 64)
    assert second.config.optim.name == "adamw_8bit"
    eurus = planned("eurus")
    kto, reward = eurus["kto"].request, eurus["reward"].request
    assert kto is not None
    assert reward is not None
    assert (kto.config.objective.desirable_weight, kto.config.optim.learning_rate) == (1.33, 5e-7)
    assert (reward.config.objective.loss_type, reward.config.optim.learning_rate) == ("eurus", 1e-5)


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
EOS = tiny.EOS
TEMPLATES = {
    "ift/zephyr.jinja": f"<|system|>\n{EOS}\n<|user|>\nWhy?{EOS}\n<|assistant|>\nSo.{EOS}\n",
    "cpo/bare.jinja": f"Why?\nSo.{EOS}",
    "ultrafeedback/human_assistant.jinja": f"Human: Why?\n\nAssistant: So.{EOS}\n\n",
}


@pytest.mark.parametrize(("file", "expected"), TEMPLATES.items())
def test_the_papers_templates(file: str, expected: str) -> None:
    path = Chat(tiny.tokenizer(), str(shelf.home() / file)).path(TURNS, [1], None)
    assert path.text == expected
    ((start, end),) = path.targets
    assert path.text[start:end].strip() == f"So.{EOS}"


@pytest.mark.nightly
def test_two_steps_of_every_training(tmp_path: Path) -> None:
    """About a minute: some forty trainings of a model with one layer."""
    tried = {name: dict(dry_run_stages(planned(name), tmp_path / name / "dry")) for name in RECIPES}
    for name, stages in tried.items():
        trained = {key for key, one in planned(name).items() if one.spec.kind in ("train", "loop")}
        assert set(stages) == trained
        for one in stages.values():
            assert len(dataclasses.asdict(one)["losses"]) == 2
