"""Values as people read them in one line."""

from __future__ import annotations

from typing import Any

import pytest

from alignlab.configuration.yamlio import WIDTH, brief

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b", "a b"),
        (1e-5, "1e-05"),
        (["x", None], "[x, null]"),
        ("x" * WIDTH, "x" * WIDTH),
        ("x" * (WIDTH + 1), "x" * (WIDTH - 3) + "..."),
        (DIGEST, "01234567"),
        (f"rows.jsonl#{DIGEST}", "rows.jsonl#01234567"),
        (f"{'x' * WIDTH}#{DIGEST}", f"{'x' * WIDTH}#01234567"),
        (f"rows.jsonl#{DIGEST[1:]}", f"rows.jsonl#{DIGEST[1:]}"[: WIDTH - 3] + "..."),
    ],
)
def test_a_value_is_one_short_line_and_keeps_its_hash(value: Any, shown: str) -> None:
    assert brief(value) == shown
