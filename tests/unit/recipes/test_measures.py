"""Paths into results."""

from __future__ import annotations

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
     ("rounds.7.n", None), ("rounds.x", None), ("after.v1", None), ("text", "0.25"), ("no.more", None)],
)  # fmt: skip
def test_what_stands_at_a_path(path: str, found: Any) -> None:
    assert follow(RESULT, path) == found


def scale(value: str, minus: str | None = None, over: str | None = None) -> Scale:
    metric = Metric("m", "m", value, minus, None, over)
    return Scale("r", "toy", Path("r/toy.yaml"), "t", None, None, "", metrics={"m": metric})


def test_a_metric_is_a_number_a_difference_or_a_ratio() -> None:
    results = {"a": RESULT, "b": {"x": 0.2}}
    assert measured(scale("a.after.eval_control/match", "b.x"), results) == {"m": pytest.approx(0.3)}
    assert measured(scale("a.text", over="b.x"), results) == {"m": pytest.approx(1.25)}
    with pytest.raises(ConfigError, match=r"metrics\.m\.over: 'b\.zero' is 0"):
        measured(scale("a.text", over="b.zero"), {**results, "b": {"zero": 0}})
    assert measured(scale("a.text"), results) == {"m": 0.25}
    assert measured(scale("a.text", "c.x"), results) == {}  # stage c was not done


@pytest.mark.parametrize(
    ("path", "said"),
    [("a.after.eval_loss", "stage a has no such figure; it has after.eval_control/match"),
     ("a.after", "is no number but holds eval_control/match"), ("b.word", "is no number: 'many'"),
     ("b.bad", "is not finite: nan")],
)  # fmt: skip
def test_a_path_that_leads_to_no_number(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        measured(scale(path), {"a": RESULT, "b": {"word": "many", "bad": "nan"}})
    assert str(caught.value).startswith(f"r/toy.yaml: metrics.m.value: '{path}'")
