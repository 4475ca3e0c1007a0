"""An entry set for a while."""

from __future__ import annotations

import pytest

from alignlab.mappings import temporary_entry


@pytest.mark.parametrize("before", [{}, {"a": 1}, {"a": None}])
def test_the_entry_is_afterwards_what_it_was(before: dict[str, int | None]) -> None:
    mapping = dict(before)
    with temporary_entry(mapping, "a", 2):
        assert mapping == {"a": 2}
    assert mapping == before
    with pytest.raises(ZeroDivisionError), temporary_entry(mapping, "a", 2):
        1 / 0  # noqa: B018
    assert mapping == before


def test_what_else_the_block_sets_or_removes_stays_so() -> None:
    mapping: dict[str, int] = {"gone": 1}
    with temporary_entry(mapping, "a", 2):
        mapping["other"] = 3
        del mapping["gone"], mapping["a"]
    assert mapping == {"other": 3}
