"""Bands: their arithmetic by hand, and when one cannot do its work."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from alignlab.errors import ConfigError
from alignlab.recipes import bands
from alignlab.recipes.bands import Band
from alignlab.recipes.scale import Metric

PLAIN = Metric("x", "x", "a.x", None, None)
DIFFERENCE = Metric("d", "d", "a.x", "b.x", None)
RATIO = Metric("r", "r", "a.x", None, None, "b.x")
CHANCE = Metric("c", "c", "a.x", None, None, chance=0.5)


def test_a_band_by_hand() -> None:
    """0.2, 0.3, 0.4, 0.5, 0.6: mean 0.4, s = sqrt(0.1 / 4) = 0.15811, t = 4.60409, half = t s sqrt(6 / 5) = 0.797452;
    three digits of it, outwards: -0.397452 -> -0.398 and 1.197452 -> 1.198."""
    half = 4.60409 * math.sqrt(0.1 / 4) * math.sqrt(6 / 5)
    assert half == pytest.approx(0.797452, abs=1e-6)
    assert bands.band_of([0.2, 0.3, 0.4, 0.5, 0.6]) == Band(-0.398, 1.198)


def test_a_band_is_rounded_outwards_at_any_size() -> None:
    for factor in (1e-6, 1.0, 1e6):
        values = [factor * value for value in (1.0, 1.1, 0.95, 1.02, 1.07)]
        made = bands.band_of(values)
        half = 4.604095 * math.sqrt(sum((v - sum(values) / 5) ** 2 for v in values) / 4) * math.sqrt(1.2)
        for end, exact in ((made.low, sum(values) / 5 - half), (made.high, sum(values) / 5 + half)):
            assert end == pytest.approx(exact, abs=0.011 * half)
        assert made.low <= sum(values) / 5 - half * 0.999999
        assert made.high >= sum(values) / 5 + half * 0.999999


def test_values_without_spread_make_a_point() -> None:
    assert bands.band_of([1.0, 1.0, 1.0]) == Band(1.0, 1.0)
    assert bands.band_of([0.0, 0.0, 0.0]) == Band(0.0, 0.0)


@pytest.mark.parametrize(
    ("metric", "band", "said"),
    [
        (DIFFERENCE, Band(-0.1, 0.2), "the seeds' band (-0.1 to 0.2) holds 0: a run without the effect would pass"),
        (DIFFERENCE, Band(0.1, 0.2), ""),
        (RATIO, Band(0.5, 1.1), "the seeds' band (0.5 to 1.1) holds 1: a run without the effect would pass"),
        (RATIO, Band(0.2, 0.9), ""),
        (CHANCE, Band(0.4, 0.9), "the seeds' band (0.4 to 0.9) holds 0.5: a run without the effect would pass"),
        (PLAIN, Band(-0.1, 0.2), ""),
        (PLAIN, Band(-0.1, 1.2), "the seeds' band (-0.1 to 1.2) holds everything from 0 to 1"),
        (PLAIN, Band(1.0, 1.0), "the seeds do not differ, so they say nothing of other runs"),
    ],
)
def test_what_cannot_fail_is_no_band(metric: Metric, band: Band, said: str) -> None:
    assert bands.cannot_fail(metric, band) == said


def test_a_band_or_why_there_is_none() -> None:
    assert bands.band_or_why(DIFFERENCE, [0.2, 0.2001, 0.2002]) == bands.band_of([0.2, 0.2001, 0.2002])
    assert "holds 0" in str(bands.band_or_why(DIFFERENCE, [-1.0, 1.0, 0.5]))
    assert bands.band_or_why(DIFFERENCE, [0.2, math.nan, math.nan]) == "not defined in 2 of 3 seeds"


def test_one_scale_is_written_and_the_others_stay(tmp_path: Path) -> None:
    bands.write(tmp_path, "toy", {"metrics": {"x": {"band": [0.1, 0.2]}}, "seeds": [1, 2, 3]})
    bands.write(tmp_path, "small", {"metrics": {}})
    bands.write(tmp_path, "toy", {"metrics": {"x": {"band": [0.3, 0.4]}}})
    text = (tmp_path / "expected.json").read_text()
    assert json.loads(text) == {"small": {"metrics": {}}, "toy": {"metrics": {"x": {"band": [0.3, 0.4]}}}}
    assert text.index('"small"') < text.index('"toy"')
    assert bands.bands(bands.read(tmp_path)["toy"]) == {"x": Band(0.3, 0.4)}
    assert bands.read(tmp_path / "elsewhere") == {}
    (tmp_path / "expected.json").write_text("{")
    with pytest.raises(ConfigError, match="calibrate= writes it anew"):
        bands.read(tmp_path)
