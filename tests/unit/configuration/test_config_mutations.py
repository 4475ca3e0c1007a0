"""Every key misspelt in five ways and every number given what is no number: refused, with the right word, at once."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.configuration import groups, schema
from alignlab.configuration.compose import compose
from alignlab.configuration.frozen import frozen_text
from alignlab.configuration.settings import GROUPS
from alignlab.errors import ConfigError
from alignlab.registry import OBJECTIVES
from alignlab.verb_table import ALL

SIMPLE = ["model=tiny", "data=sums"]


def mutations(key: str) -> dict[str, str]:
    """``key`` as it may be mistyped."""
    section, _, leaf = key.rpartition(".")
    dot = section + "." if section else ""
    middle = len(leaf) // 2
    return {
        "a letter missing": dot + leaf[:middle] + leaf[middle + 1 :],
        "two letters swapped": dot + leaf[: middle - 1] + leaf[middle] + leaf[middle - 1] + leaf[middle + 1 :],
        "case": dot + leaf.upper(),
        "plural": dot + leaf + "s",
        "wrong section": ("optim." if section != "optim" else "train.") + leaf,
    }


def refusals(tokens: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(tokens, needs=ALL)
    return str(caught.value).split("\n")


def suggested(line: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", line) is not None


def test_every_misspelt_key_is_refused_and_nine_in_ten_with_the_right_suggestion() -> None:
    wrong, right, missed = 0, 0, []
    for objective in OBJECTIVES.names():
        known = schema.schema(objective)
        # The keys that all objectives share are tried with one of them.
        tried = [key for key in known if objective == "dpo" or key.startswith("objective.")]
        cases = [
            (key, how, typed)
            for key in tried
            for how, typed in mutations(key).items()
            if typed not in known and typed not in GROUPS  # such as optim.name for peft.name
        ]
        tokens = list(dict.fromkeys(f"{typed}=1" for _, _, typed in cases))
        lines = dict(zip(tokens, refusals([f"objective={objective}", *SIMPLE, *tokens]), strict=True))
        for key, how, typed in cases:
            line = lines[f"{typed}=1"]
            assert line.startswith(f"unknown key '{typed}': "), line
            wrong += 1
            right += suggested(line, key)
            if not suggested(line, key):
                missed.append(f"{how}: {key} -> {line}")
    print(f"{wrong} misspelt keys refused; the right key suggested for {right} ({100 * right / wrong:.1f}%)")
    assert wrong > 500
    assert right >= 0.9 * wrong, "\n".join(missed)


def numeric(objective: str) -> list[schema.Key]:
    return [key for key in schema.schema(objective).values() if {int, float} & set(schema.members(key.type))]


NO_NUMBERS = [
    "nan", "inf", "-inf", "NaN", ".nan", "1e400", "-1e400", "many", "true", "false", "[1]", "{a: 1}", "''", " ",
]  # fmt: skip
NEGATIVE_IS_FINE: dict[str, str] = {
    "objective.simpo_gamma": "a target margin may be negative",
}
ZERO_IS_FINE = {
    "data.condition.drop": "no row loses its condition",
    "data.condition.seed": "a seed",
    "data.eval_fraction": "no rows are held out",
    "data.max_reject_fraction": "no row may be rejected",
    "eval.generate": "nothing is generated",
    "eval.temperature": "greedy",
    "eval.top_p": "the most probable token alone",
    "objective.absolute_weight": "no absolute terms",
    "objective.center_rewards_coefficient": "no such term",
    "objective.desirable_weight": "these rows weigh nothing",
    "objective.disturb_std": "no disturbance",
    "objective.gamma": "weights of one",
    "objective.label_smoothing": "no label is flipped",
    "objective.max_lambda": "no residual connection",
    "objective.min_lambda": "the schedule starts at none",
    "objective.pair_weight": "no pair term for flagged pairs",
    "objective.simpo_gamma": "no margin",
    "objective.undesirable_weight": "these rows weigh nothing",
    "optim.alpha": "no memory of squared gradients",
    "optim.beta1": "no momentum",
    "optim.beta2": "no memory of squared gradients",
    "optim.learning_rate": "a dry run",
    "optim.max_grad_norm": "no clipping",
    "optim.warmup_ratio": "no warm-up",
    "optim.warmup_steps": "no warm-up",
    "optim.weight_decay": "no decay",
    "peft.lora_dropout": "no dropout",
    "seed": "a seed",
}
"""Where 0 means something."""


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_every_number_refuses_what_it_cannot_be(objective: str) -> None:
    base = [f"objective={objective}", *SIMPLE]
    own = [key for key in numeric(objective) if objective == "dpo" or key.name.startswith("objective.")]
    for value in NO_NUMBERS if own else ():
        lines = refusals([*base, *(f"{key.name}={value}" for key in own)])
        assert [line.partition(": ")[0] for line in lines] == [key.name for key in own], value
    for key in own:
        for value, fine in (("-1", NEGATIVE_IS_FINE), ("-0.5", NEGATIVE_IS_FINE), ("0", ZERO_IS_FINE)):
            if key.name in fine:
                if value != "-0.5" or int not in schema.members(key.type):
                    compose([*base, f"{key.name}={value}"])
                continue
            assert any(key.name in line for line in refusals([*base, f"{key.name}={value}"])), (key.name, value)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_numbers_of_a_file_are_held_to_the_same(objective: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    own = [key.name for key in numeric(objective) if objective == "dpo" or key.name.startswith("objective.")]
    for value in (".nan", ".inf", "-.inf", "1e400", "true", '"many"', "[1]", "{a: 1}") if own else ():
        stated = "".join(f"{key}: {value}\n" for key in own)
        file.write_text(f"objective: {objective}\nmodel: tiny\ndata: sums\n{stated}")
        with pytest.raises(ConfigError) as caught:
            compose(file=file)
        found = [line.split(": ")[:2] for line in str(caught.value).split("\n")]
        assert found == [["mine.yaml", key] for key in own], value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "many", True, [1], {"a": 1}])
def test_numbers_from_python_are_held_to_the_same(value: Any) -> None:
    own = [key.name for key in numeric("dpo")]
    with pytest.raises(ConfigError) as caught:
        compose(["objective=dpo", *SIMPLE], values=dict.fromkeys(own, value))
    assert [line.partition(": ")[0] for line in str(caught.value).split("\n")] == own


def test_the_lists_above_name_existing_numbers() -> None:
    known = {key.name for objective in OBJECTIVES.names() for key in numeric(objective)}
    assert set(ZERO_IS_FINE) | set(NEGATIVE_IS_FINE) <= known


@pytest.mark.parametrize("recipe", groups.options("recipe"))
def test_recipes_compose_and_come_back(recipe: str, tmp_path: Path) -> None:
    made = compose(["objective=dpo", *SIMPLE, f"recipe={recipe}"], needs=ALL)
    file = tmp_path / "run.yaml"
    file.write_text(frozen_text(made.config, made.provenance))
    assert compose(file=file).config == made.config


@pytest.mark.parametrize("token", ["data.sources=[{path: a, weigt: 2}]", "data.sources=3"])
def test_rows_that_are_given_and_wrong_are_not_missing_too(token: str) -> None:
    (line,) = refusals(["objective=dpo", "model=tiny", token])
    assert line.startswith(token.partition("=")[0])


# --- exit code and time --------------------------------------------------------------------------------------------

WRONG = ["optim.learning_rat=1", "optim.learning_rate=nan", "train.max_steps=true", "objective.beta=1e400", "lr=1"]


def test_all_is_said_at_once_with_exit_code_2_before_any_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("alignlab.runs.job.load_model", "alignlab.models.load.load_model", "alignlab.runs.job.prepare_data"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("reached"))
    for verb in ("train", "prepare", "inspect", "probe"):
        assert main([verb, "objective=dpo", *SIMPLE, *WRONG]) == 2
        assert len(capsys.readouterr().err.splitlines()) == len(WRONG)
    assert not list(tmp_path.iterdir())


def test_the_answer_takes_seconds_and_no_model_library(tmp_path: Path) -> None:
    code = (
        "import sys, time; from alignlab.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(sorted({'transformers', 'datasets', 'deepspeed', 'peft'} & set(sys.modules)), time.process_time())\n"
        "sys.exit(code)"
    )
    idle = ["objective.simpo_gamma=1", "optim.alpha=0.5"]
    for words, lines in ((WRONG, len(WRONG)), (idle, len(idle))):
        done = subprocess.run(
            [sys.executable, "-c", code, "train", "objective=dpo", *SIMPLE, *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        libraries, seconds = done.stdout.rsplit(maxsplit=1)
        assert (done.returncode, libraries) == (2, "[]"), done.stderr
        assert len(done.stderr.splitlines()) == lines
        assert float(seconds) <= 5  # of the processor's time: how busy the machine is does not matter
