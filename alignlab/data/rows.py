"""Rows of files, folders and hub data sets, one by one, with the place each came from.

The reader is strict, because lenient ones hide damage: UTF-8 or nothing, no ``NaN``, no key twice, no half surrogate.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from alignlab.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its place: ``line`` counts from 1 (in a parquet file or a list: the row's number)."""

    file: str
    line: int
    value: dict[str, Any]


def read_rows(
    path: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    on_error: Callable[[DataError], None] | None = None,
) -> Iterator[Row]:
    """Rows of a .jsonl(.gz), .json(.gz) or .parquet file, of a folder of them, or of a hub data set.

    ``path`` is a hub name (``owner/name`` or ``owner/name:config``) only when nothing of that name exists here and it
    does not look like a file.  ``columns`` maps our names to the file's.  ``split`` chooses among the files of a folder
    that are named by split, and the split of a hub data set; a single file is read whole.  ``limit``: the first rows
    only.  A row that cannot be read raises :class:`DataError` (file, line, what); with ``on_error`` the error goes
    there and reading goes on, as far as the file allows it.
    """
    rows = _local(Path(path), split, on_error) if _is_local(path) else _hub(path, split)
    for row in itertools.islice(rows, limit):
        if not columns:
            yield row
            continue
        try:
            yield Row(row.file, row.line, _renamed(row, columns))
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)


def fingerprint(path: str, split: str = "train", options: Mapping[str, Any] | None = None) -> str:
    """Hash of what :func:`read_rows` would read: names and contents of the files, or the hub data set's own hash.

    A name that is neither (a source made by code) is identified by its ``options``.
    """
    digest = hashlib.sha256()
    if _is_local(path):
        for file in _files(Path(path), split):
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    elif "/" in path:
        digest.update(_hub_data(path, split)._fingerprint.encode())
    else:
        digest.update(json.dumps([path, split, dict(options or {})], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def parse(text: bytes | str) -> dict[str, Any]:
    """One strict JSON object; ``ValueError`` says what is wrong with it."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(value, text)
    return value


def _check(value: Any, text: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, not {_kind(value)}")
    if "\\u" in text:
        # An escaped half surrogate is valid JSON and no valid text: tokenizers and files choke on it much later.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key '{twice}' stands twice")
    return made


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)


def _is_local(path: str) -> bool:
    if Path(path).exists():
        return True
    if path.endswith(SUFFIXES) or path[:1] in ("/", ".", "~") or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{path}: no such file or folder")
    return False


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
        return [path]
    found = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))
    found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if not found:
        raise DataError(f"{path}: holds no file ending in {', '.join(SUFFIXES)}")
    words = {f: set(re.split(r"[^a-z0-9]+", str(f.relative_to(path)).lower())) for f in found}
    named = [f for f in found if split.lower() in words[f]]
    if not named and any(words[f] & _SPLITS for f in found):
        raise DataError(f"{path}: no file of split '{split}' ({', '.join(f.name for f in found[:5])}); set data.split")
    return named or found


def _local(path: Path, split: str, on_error: Callable[[DataError], None] | None) -> Iterator[Row]:
    for file in _files(path, split):
        lines = _parquet(file) if file.suffix == ".parquet" else _json(file)
        while True:
            try:
                row = next(lines, None)
            except DataError as error:  # the file as a whole
                if on_error is None:
                    raise
                on_error(error)
                break
            if row is None:
                break
            if isinstance(row, Row):
                yield row
            elif on_error is None:
                raise row
            else:
                on_error(row)


def _json(file: Path) -> Iterator[Row | DataError]:
    """Rows and the errors of single rows; an error of the file itself is raised."""
    number = 0
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            if ".json" in file.suffixes[-2:] and stream.read(4).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                stream.seek(0)
                yield from _list(file, stream.read())
                return
            stream.seek(0)
            for number, line in enumerate(stream, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                try:
                    yield Row(str(file), number, parse(line))
                except ValueError as error:
                    yield _error(file, number, error)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: line {number + 1}: cannot be read ({error})") from None


def _list(file: Path, text: bytes) -> Iterator[Row | DataError]:
    try:
        decoded = text.decode("utf-8-sig")
        values = json.loads(decoded, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise _error(file, getattr(error, "lineno", 1), error) from None
    for number, value in enumerate(values, 1):
        try:
            _check(value, decoded)
            yield Row(str(file), number, value)
        except ValueError as error:
            yield DataError(f"{file}: row {number}: {error}")


def _error(file: Path, number: int, error: Exception) -> DataError:
    what = error
    if isinstance(error, json.JSONDecodeError):
        what = ValueError(f"not JSON: {error.msg} at column {error.colno}")
    elif isinstance(error, UnicodeDecodeError):
        what = ValueError(f"not UTF-8 at byte {error.start}")
    return DataError(f"{file}: line {number}: {what}")


def _parquet(file: Path) -> Iterator[Row | DataError]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(str(file), number, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: row {number + 1}: cannot be read ({str(error).splitlines()[0]})") from None


def _hub_data(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: no such file; a hub data set needs `pip install alignlab[hub]`") from None
    name, _, config = path.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: no such file, and the hub data set cannot be loaded ({reason})") from None


def _hub(path: str, split: str) -> Iterator[Row]:
    for number, value in enumerate(_hub_data(path, split), 1):
        yield Row(f"{path}[{split}]", number, dict(value))


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row.value:
            has = ", ".join(sorted(row.value))
            raise DataError(f"{row.file}: line {row.line}: key '{theirs}' (columns.{ours}) is missing; it has {has}")
    kept = {name: value for name, value in row.value.items() if name not in columns.values()}
    return {**kept, **{ours: row.value[theirs] for ours, theirs in columns.items()}}
