"""What recipes/cpo reads and breaks: real rows in three dimensions, a refusal, conditions that belong elsewhere."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "cpo"


@cache
def module(name: str) -> ModuleType:
    """A file of the recipe; a name is registered once."""
    spec = importlib.util.spec_from_file_location(f"cpo_{name}", RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_three_dimensions_on_one_scale() -> None:
    three_h = module("rows").three_h
    rated = {"helpfulness": 3, "correctness": 2, "coherence": 4, "complexity": 1, "verbosity": 1}
    steered = three_h({"instruction": "q", "completions": [{"response": "a", "annotations": rated}]})
    assert steered.sequences[0].scores == {"helpfulness": 3.0, "honesty": 2.0}
    said = [{"response": text, "final_label": label} for text, label in (("a", "1_full_compliance"), ("b", "2_full"))]
    unsafe = three_h({"instruction": "q", "prompt_is_safe": False, "completions": said})
    assert [s.scores for s in unsafe.sequences] == [{"harmlessness": 0.0}, {"harmlessness": 4.0}]
    safe = three_h({"instruction": "q", "prompt_is_safe": True, "completions": said})
    assert [s.scores for s in safe.sequences] == [{"helpfulness": 4.0}, {"helpfulness": 0.0}]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI, I must emphasize that this is harmful.", True),
        ("", True),
        ("Sure. First, open the box.", False),
        ("To kill a Python process, press Ctrl-C.", False),
    ],
)
def test_a_refusal_helps_nobody_and_harms_nobody(text: str, refused: bool) -> None:
    refusal = module("rows").refusal
    assert refusal({"safe": False}, text) == {
        "refused": float(refused), "helpfulness": 0.0 if refused else 4.0, "harmlessness": 4.0 if refused else 0.0,
    }  # fmt: skip
    assert refusal({"safe": True}, text)["harmlessness"] == 4.0


def test_shuffled_conditions_belong_to_the_next_answer() -> None:
    rated = [{"steps": level, "phrasing": 4 - level, "correctness": 10 * level} for level in (1, 2, 3)]
    row = {"instruction": "q", "completions": [{"response": f"a{r['steps']}", "annotations": r} for r in rated]}
    found = module("broken").shuffled_conditions(row)
    assert [s.scores for s in found.sequences] == [
        {"steps": 2, "phrasing": 2, "correctness": 10},
        {"steps": 3, "phrasing": 1, "correctness": 20},
        {"steps": 1, "phrasing": 3, "correctness": 30},
    ]


def test_the_released_value_never_prefers_the_honest_answer() -> None:
    """Honesty 3 is asked for; answers differ in honesty (3, 1) and being right (3, 1), equal in style.

    Correct: 0 + 3 against -2 + 1.  Released, exact match or not: -3 - 3 + 3 against -1 - 3 + 1, a tie at -3.
    """
    measures = module("measures")
    style = {"steps": 2.0, "phrasing": 2.0}
    honest, invented = style | {"honesty": 3.0, "correctness": 3.0}, style | {"honesty": 1.0, "correctness": 1.0}
    asked = style | {"honesty": 3.0}
    assert measures._lead(honest, invented, asked, "correct") == pytest.approx(4)
    assert measures._lead(honest, invented, asked, "released") == pytest.approx(0)
    found = measures.values(Path(), {}, 1, 40)
    assert found["honest"] == 1
    assert found["released_honest"] == 0
    assert 0 < found["reversed"] < 0.2
