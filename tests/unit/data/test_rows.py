"""The strict reader: every kind of file, every kind of damage, and the place of each."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from alignlab.data.rows import Row, fingerprint, parse, read_rows
from alignlab.errors import DataError

ROWS = [{"prompt": "p", "completion": "c", "n": 1}, {"prompt": "é\U0001f600", "completion": "d", "n": 2}]


def lines(rows: list[dict[str, object]] = ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines()))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_bytes(lines())
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "b.json", "a.parquet"):
        file = str(tmp_path / name)
        assert list(read_rows(file)) == [Row(file, 1, ROWS[0]), Row(file, 2, ROWS[1])], name


def test_bom_crlf_and_blank_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert [(row.line, row.value) for row in read_rows(str(file))] == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b'{"a": 1', "not JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"x": {"a": 1, "a": 2}}', "key 'a' stands twice"),
        (b'{"a": 1}{"b": 2}', "not JSON"),
        (b"[1, 2]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not null"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2"),
    ],
)
def test_damage_names_file_and_line_or_is_handed_over(tmp_path: Path, bad: bytes, what: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 0}\n' + bad + b'\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 2: .*") as error:
        list(read_rows(str(file)))
    assert what in str(error.value)
    assert "\n" not in str(error.value)
    errors: list[DataError] = []
    assert [row.value["a"] for row in read_rows(str(file), on_error=errors.append)] == [0, 3]
    assert len(errors) == 1


def test_a_truncated_gzip_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(lines([{"n": i} for i in range(10000)]))[:-40])
    errors: list[DataError] = []
    assert len(list(read_rows(str(file), on_error=errors.append))) > 1000
    assert "cannot be read" in str(errors[0])


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse(data), dict)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(TEXT, st.integers() | TEXT | st.none()))
def test_what_json_writes_is_read_back(value: dict[str, object]) -> None:
    assert parse(json.dumps(value)) == value


def test_columns_are_renamed_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines())
    first = next(read_rows(str(file), columns={"question": "prompt", "answer": "completion"}))
    assert first.value == {"question": "p", "answer": "c", "n": 1}
    swapped = next(read_rows(str(file), columns={"prompt": "completion", "completion": "prompt"}))
    assert swapped.value == {"prompt": "c", "completion": "p", "n": 1}
    with pytest.raises(DataError, match=r"line 1: key 'answr' \(columns.completion\) is missing; it has completion, n"):
        next(read_rows(str(file), columns={"completion": "answr"}))


def test_folders_are_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "x.train.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "x.test.jsonl").write_bytes(lines(ROWS[1:]))
    (tmp_path / ".hidden.jsonl").write_bytes(b"junk")
    assert [row.value["n"] for row in read_rows(str(tmp_path))] == [1]
    assert [row.value["n"] for row in read_rows(str(tmp_path), split="test")] == [2]
    with pytest.raises(DataError, match="no file of split 'dev'"):
        list(read_rows(str(tmp_path), split="dev"))
    plain = tmp_path / "more"
    plain.mkdir()
    (plain / "b.jsonl").write_bytes(lines(ROWS[1:]))
    (plain / "a.jsonl").write_bytes(lines(ROWS[:1]))
    assert [row.value["n"] for row in read_rows(str(plain))] == [1, 2]
    assert len(list(read_rows(str(plain), limit=1))) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        list(read_rows(str(tmp_path / "empty")))


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/nowhere/missing", "a b c", "some/where/deep"])
def test_what_looks_like_a_file_is_never_asked_of_a_hub(path: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_rows(path))


def test_an_unknown_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match="unknown kind of file"):
        list(read_rows(str(tmp_path / "a.csv")))


def test_the_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "sub" / "a.jsonl"
    other.parent.mkdir()
    for one in (file, other):
        one.write_bytes(lines())
    assert fingerprint(str(file)) == fingerprint(str(other))
    other.write_bytes(lines()[:-2] + b" }")
    assert fingerprint(str(file)) != fingerprint(str(other))
    assert fingerprint("sums", "train", {"rows": 1}) != fingerprint("sums", "train", {"rows": 2})
