"""Paths into results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import ConfigError
from alignlab.recipes.measures import follow, measured
from alignlab.recipes.scale import Metric, Scale

RESULT = {"after": {"eval_control/match": 0.5, "v1.5.x": 3}, "rounds": [{"n": 1}, {"n": 4}], "text": "0.25", "no": None}


@pytest.mark.parametrize(
    ("path", "found"),
    [("after.eval_control/match", 0.5), ("after.v1.5.x", 3), ("rounds.-1.n", 4), ("rounds.0.n", 1),
     ("text", "0.25"), ("no", None), ("no.more.1", None)],
)  # fmt: skip
def test_what_stands_at_a_path(path: str, found: Any) -> None:
    assert follow(RESULT, path) == found


@pytest.mark.parametrize("path", ["rounds.7.n", "rounds.x", "after.v1", "text.more", "yes"])
def test_where_nothing_stands(path: str) -> None:
    with pytest.raises(LookupError):
        follow(RESULT, path)


def scale(value: str, minus: str | None = None, over: str | None = None) -> Scale:
    metric = Metric("m", "m", value, minus, None, over)
    return Scale("r", "toy", Path("r/toy.yaml"), "t", None, None, "", metrics={"m": metric})


def test_a_metric_is_a_number_a_difference_or_a_ratio() -> None:
    results = {"a": RESULT, "b": {"x": 0.2}}
    assert measured(scale("a.after.eval_control/match", "b.x"), results) == {"m": pytest.approx(0.3)}
    assert measured(scale("a.text", over="b.x"), results) == {"m": pytest.approx(1.25)}
    assert measured(scale("a.text"), results) == {"m": 0.25}
    assert measured(scale("a.text", "c.x"), results) == {}  # stage c was not done


@pytest.mark.parametrize(
    ("value", "minus", "over"),
    [("a.no", None, None), ("a.no.value", None, None), ("a.text", "a.no", None), ("a.text", None, "b.zero"),
     ("b.bad", None, None)],
)  # fmt: skip
def test_a_figure_that_a_run_does_not_define(value: str, minus: str | None, over: str | None) -> None:
    found = measured(scale(value, minus, over), {"a": RESULT, "b": {"zero": 0, "bad": "nan"}})
    assert math.isnan(found["m"])


@pytest.mark.parametrize(
    ("path", "said"),
    [("a.after.eval_loss", "stage a has no such figure; it has after.eval_control/match"),
     ("a.after", "is no number but holds eval_control/match"), ("b.word", "is no number: 'many'")],
)  # fmt: skip
def test_a_path_that_leads_to_no_number(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        measured(scale(path), {"a": RESULT, "b": {"word": "many"}})
    assert str(caught.value).startswith(f"r/toy.yaml: metrics.m.value: '{path}'")
