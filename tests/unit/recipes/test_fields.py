"""``{seed}`` and the other fields in a scale file's texts."""

from __future__ import annotations

from alignlab.recipes import fields


def test_fields_are_found_in_all_texts() -> None:
    value = {"a": ["{run.x}/rows", 3], "b": {"c": "{seed} and {model.y}"}, "d": "no {} field { here }"}
    assert list(fields.fields(value)) == [("run", "x"), ("seed", ""), ("model", "y")]


def test_the_seed_makes_numbers_and_other_texts_stay_texts() -> None:
    """``{seed}01`` of seed 3 is 301, of seed 0 it is 1; digits without the seed stay the text they were."""

    def fill(kind: str, name: str) -> str | None:
        return {"seed": "3", "rows": "/rows"}.get(kind)

    value = {"a": "{seed}01", "b": "run-{seed}", "c": ["{rows}/x", 5, None], "d": "12", "e": "{model.x}/y"}
    assert fields.filled(value, fill) == {"a": 301, "b": "run-3", "c": ["/rows/x", 5, None], "d": "12",
                                          "e": "{model.x}/y"}  # fmt: skip
    assert fields.filled("{seed}01", lambda kind, name: "0") == 1
