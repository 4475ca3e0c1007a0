"""What a verdict says, and when it passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignlab.recipes.bands import Band
from alignlab.recipes.scale import Metric, Scale
from alignlab.recipes.verdict import Verdict, lines_of, markdown, text

GAIN = Metric("gain", "IFT - SFT | right", "a.x", "b.x", "0.96")
SCALE = Scale("ift", "toy", Path("ift/toy.yaml"), "t", None, None, "", metrics={"gain": GAIN})


def made(value: float | None, band: Band | None = Band(0.1, 0.2), **more: Any) -> Verdict:  # noqa: B008
    values = {} if value is None else {"gain": value}
    return Verdict(SCALE, 0, lines_of(SCALE, values, {} if band is None else {"gain": band}, {}, None), **more)


@pytest.mark.parametrize(
    ("value", "band", "broken", "passes", "cell"),
    [
        (0.1, Band(0.1, 0.2), None, True, "yes"),
        (0.2001, Band(0.1, 0.2), None, False, "NO"),
        (0.3, None, None, True, "no band yet"),
        (None, Band(0.1, 0.2), None, True, "not measured"),
        (0.15, Band(0.1, 0.2), "late", False, "YES: not noticed"),
        (0.3, Band(0.1, 0.2), "late", True, "no, as it should"),
        (0.3, None, "late", True, "no band yet"),
        (math.nan, Band(0.1, 0.2), None, False, "NO"),
        (math.nan, Band(0.1, 0.2), "late", True, "no, as it should"),
        (math.nan, None, None, True, "no band yet"),
    ],
)
def test_when_it_passes(value: float | None, band: Band | None, broken: str | None, passes: bool, cell: str) -> None:
    verdict = made(value, band, broken=broken)
    assert verdict.passed is passes
    assert verdict.rows()[0][-1] == cell


def test_a_figure_that_the_run_does_not_define() -> None:
    verdict = made(math.nan)
    assert verdict.rows()[0][-2:] == ["not defined", "NO"]
    assert verdict.remarks()[0] == "outside  ift gain: this run does not define it, so it is not in 0.1 to 0.2"
    (found,) = verdict.as_json()["metrics"]
    assert (found["measured"], found["undefined"], found["inside"]) == (None, True, False)


def test_a_failed_stage_passes_nothing() -> None:
    assert not made(0.15, error="no memory").passed
    assert made(0.15, error="no memory").remarks() == ["failed   ift: no memory"]


def test_what_differs_is_said_and_versions_where_something_is_outside() -> None:
    more = {"differs": ["seed 1 -> 2 (sft)"], "versions": ["torch 2.10 -> 2.11"]}
    assert made(0.15, **more).remarks() == ["differs  ift: seed 1 -> 2 (sft)"]  # the bands are of other settings
    assert made(0.15, versions=more["versions"]).remarks() == []
    assert made(0.3, **more).remarks() == [
        "outside  ift gain: 0.3 is not in 0.1 to 0.2", "differs  ift: seed 1 -> 2 (sft)",
        "differs  ift: torch 2.10 -> 2.11",
    ]  # fmt: skip
    assert made(0.3, unknown="rows of seed 0 have no record").remarks()[1:] == [
        "differs  ift: no setting, template or version from what ift/expected.json recorded",
        "unknown  ift: rows of seed 0 have no record",
    ]


def test_the_table() -> None:
    assert markdown([made(0.15)]) == (
        "| measure | published | expected at this scale | measured | inside? |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| IFT - SFT \\| right | 0.96 | 0.1 to 0.2 | 0.15 | yes |\n"
    )
    assert text([made(0.3, broken="late")]).splitlines()[0] == "verdict  ift scale=toy seed=0   broken: late"
