"""What ``sample`` prints, read as rows."""

from __future__ import annotations

import pytest

from alignlab.data.formats import recognise, to_sample
from alignlab.data.rows import Row
from alignlab.errors import DataError
from alignlab.types import Sequence


def read(row: dict) -> list[Sequence]:
    return to_sample(Row("a.jsonl", 1, row)).sequences


def test_each_text_is_a_sequence() -> None:
    prompt = [{"role": "user", "content": "Hi"}]
    row = {"id": "7", "prompt": prompt, "requested": {}, "texts": ["Ho", ""], "measures": [{}, {}]}
    assert recognise(set(row)) == "sampled"
    assert read(row) == [
        Sequence(prompt, [{"role": "assistant", "content": text}]) for text in ("Ho", "")
    ]  # fmt: skip
    assert read({"prompt": "Once", "texts": ["upon"]}) == [Sequence("Once", "upon")]


@pytest.mark.parametrize("texts", ["Ho", [], [1]])
def test_texts_are_a_list_of_texts(texts: object) -> None:
    with pytest.raises(DataError, match="texts"):
        read({"prompt": "Hi", "texts": texts})
