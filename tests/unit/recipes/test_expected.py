"""The recipes' recorded bands: from five seeds at least, by their own arithmetic, and each wrong setting outside."""

from __future__ import annotations

from typing import Any

import pytest

from alignlab.recipes import bands, shelf
from alignlab.recipes.reading import read

RECORDED = [
    (name, scale) for name in shelf.names() for scale in bands.read(shelf.find(name))
]  # fmt: skip


@pytest.fixture(params=RECORDED, ids="-".join)
def recorded(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """(the scale as its file has it now, its entry of expected.json)."""
    name, scale = request.param
    folder = shelf.find(name)
    return read(folder, scale), bands.read(folder)[scale]


def test_the_record_is_of_the_file_as_it_stands(recorded: tuple[Any, dict[str, Any]]) -> None:
    scale, entry = recorded
    assert sorted(entry["metrics"]) == sorted(scale.metrics)
    assert sorted(entry["broken"]) == sorted(scale.broken)


def test_bands_are_those_of_the_values(recorded: tuple[Any, dict[str, Any]]) -> None:
    scale, entry = recorded
    assert len(set(entry["seeds"])) >= 5
    assert 0 not in entry["seeds"], "the default seed is a fresh one"
    for name, one in entry["metrics"].items():
        assert len(one["values"]) == len(entry["seeds"])
        band = bands.band_of(one["values"])
        if "band" in one:
            width = band.high - band.low
            assert one["band"] == pytest.approx(
                [band.low, band.high], abs=0.02 * width
            )  # values are kept to six digits
            assert not bands.cannot_fail(scale.metrics[name], bands.Band(*one["band"]))
        else:
            assert bands.cannot_fail(scale.metrics[name], band)


def test_every_wrong_setting_is_outside(recorded: tuple[Any, dict[str, Any]]) -> None:
    _, entry = recorded
    known = bands.bands(entry)
    assert entry["broken"]
    for name, one in entry["broken"].items():
        assert not known[one["metric"]].holds(one["value"]), name


@pytest.mark.parametrize("name", shelf.names())
def test_every_recipe_has_its_page(name: str) -> None:
    text = (shelf.find(name) / "README.md").read_text(encoding="utf-8")
    assert "What is published" in text
    assert "Known differences" in text
