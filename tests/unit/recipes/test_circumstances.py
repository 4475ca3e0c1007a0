"""What is said to differ from a record."""

from __future__ import annotations

from typing import Any

from alignlab.recipes.circumstances import differences, other_versions, seeds_without

RECORD: dict[str, Any] = {
    "settings": {
        "*": {"optim.beta2": 0.99, "seed": 1},
        "sft": {"objective.name": "sft"},
        "ift": {"objective.name": "ift", "objective.max_lambda": 0.2},
        "count": {"code": {"own.py": "aa"}, "with": {"n": 3}},
    },
    "data": {"1": {"sft": {"train": "aaaa", "held_out": "bbbb"}}},
    "templates": {"sft": "chatml#1"},
    "versions": {"torch": "2.10", "commit": "x"},
}


def said(settings: Any = None, seed: int = 1, rows: Any = None, templates: Any = None) -> list[str]:
    now = {"settings": settings or RECORD["settings"], "templates": templates or RECORD["templates"]}
    return list(differences(RECORD, now, seed, rows or {}))


def test_nothing_differs_from_itself() -> None:
    assert said(rows=RECORD["data"]["1"]) == []


def test_settings_by_key_with_the_stages_that_have_them() -> None:
    settings = {
        "*": {"optim.beta2": 0.9, "seed": 1},
        "sft": {"objective.name": "sft"},
        "ift": {"objective.name": "ift", "objective.max_lambda": 0.3},
        "count": {"code": {"own.py": "aa"}, "with": {"n": 3}},
        "new": {},
    }
    assert said(settings) == [
        "stage new is new", "optim.beta2 0.99 -> 0.9 (sft, ift)", "objective.max_lambda 0.2 -> 0.3 (ift)",
    ]  # fmt: skip


def test_a_key_that_is_new_counts_where_somebody_set_it() -> None:
    """``train.nonfinite`` is ``stop`` by default: a record from before the key was there says nothing against it."""
    for value, found in (("stop", []), ("skip", ["train.nonfinite null -> skip (sft, ift)"])):
        settings = {**RECORD["settings"], "*": {**RECORD["settings"]["*"], "train.nonfinite": value}}
        assert said(settings) == found


def test_rows_are_compared_where_the_seed_has_a_record() -> None:
    rows = {"sft": {"train": "aaaa", "held_out": "cccc"}}
    assert said(rows=rows) == ["data of sft (held_out) bbbb -> cccc"]
    assert said(rows=rows, seed=2) == ["data of sft (held_out) bbbb -> cccc"]  # the same for all recorded seeds
    several = {**RECORD, "data": {**RECORD["data"], "3": {"sft": {"train": "aaaa", "held_out": "dddd"}}}}
    now = {"settings": RECORD["settings"], "templates": {}}
    assert list(differences(several, now, 2, rows)) == []
    assert seeds_without(several, 2, rows)
    assert not seeds_without(several, 3, rows)


def test_templates_and_versions() -> None:
    assert said(templates={"sft": "chatml#2"}) == ["template of sft chatml#1 -> chatml#2"]
    both = [{"torch": "2.10", "commit": "x"}, {"torch": "2.11", "commit": "x"}, {"torch": "2.11", "commit": "x"}]
    assert other_versions(RECORD, both) == ["torch 2.10 -> 2.11"]
