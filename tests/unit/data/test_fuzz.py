"""Damaged rows of every format: none crashes the reader, each is accepted or rejected with its place and reason.

The ordinary run takes 100,000 rows through reader, format and adaptation, and some thousands through a whole
preparation; the nightly run takes 100,000 through a whole preparation.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.config import DataConfig
from alignlab.data import cache, rows
from alignlab.data.examples import fault, to_examples
from alignlab.data.formats import recognise, to_sample
from alignlab.data.index import Index
from alignlab.data.overlap import hashes
from alignlab.data.prepare import prepare
from alignlab.data.rows import Row, RowError, read_rows
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.errors import DataError
from alignlab.models import tiny
from alignlab.registry import FORMATS
from alignlab.types import Unit

Json = dict[str, Any]


def turn(role: str, content: str, **more: Any) -> Json:
    return {"role": role, "content": content, **more}


ASKED = [turn("system", "Be brief."), turn("user", "What is 2 + 2?\nShow it – please.")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [2, None, True]}}}
SHAPES: tuple[Json, ...] = (
    {"id": "a1", "prompt": ASKED, "requested": {}, "texts": ["4", "5"], "measures": [{}, {}]},
    {
        "id": "m1",
        "source": "chat",
        "messages": [*ASKED, turn("assistant", "4"), turn("user", "Sure?"), turn("assistant", "Yes é\U0001f600")],
    },
    {
        "messages": [
            turn("user", "add"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "4"),
            turn("assistant", "It is 4."),
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}]),
    },
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}], "system": "s"},
    {"prompt": "Once upon", "completion": " a time", "weight": 0.5},
    {"prompt": ASKED, "completion": [turn("assistant", "4")], "scores": {"helpfulness": {"Rating": "4"}}},
    {"text": "All of it is learnt.", "id": 7},
    {"instruction": "Translate", "input": "chat", "output": "cat"},
    {"question": "2 + 2?", "answer": "So 2 + 2 = 4 #### 4", "final_answer": "4"},
    {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"},
    {"question": "Does it?", "contexts": ["One.", "Two."], "answer": "yes", "long_answer": "It does."},
    {
        "prompt": ASKED,
        "chosen": [turn("assistant", "4")],
        "rejected": [turn("assistant", "5")],
        "margin": 1.5,
        "score_chosen": 8,
        "score_rejected": 3.5,
    },
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "subset": "math-prm", "id": 7},
    {"prompt": "Name a prime.", "chosen": ["2", "3"], "rejected": ["4", "6"], "subset": "Ties", "num_correct": 2},
    {"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: c"},
    {"prompt": "p", "chosen": "good", "rejected": "bad", "verify": {"kind": "number", "answer": "4"}},
    {"prompt": ASKED, "completion": [turn("assistant", "4")], "label": True},
    {
        "instruction": "Say",
        "completions": [
            {"response": "one", "annotations": {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}}},
            {"response": "two", "annotations": {"helpfulness": {"Rating": "2"}}, "overall_score": 3.0},
        ],
    },
    {
        "prompt": "Say",
        "completions": [{"response": "one"}, {"response": "two"}],
        "pairwise": [{"a": 0, "b": 1, "preferred": "b"}],
    },
    {
        "trajectory": [
            {"from": "user", "value": "q"},
            {"from": "assistant", "value": "try"},
            {"from": "user", "value": "no"},
        ],
        "chosen": "right",
        "rejected": "wrong",
        "absolute": True,
    },
    {
        "prompt": "q",
        "trajectories": [
            {"success": True, "turns": [turn("assistant", "a"), turn("user", "o"), turn("assistant", "b")]},
            {"success": False, "turns": [turn("assistant", "c")]},
        ],
    },
    {
        "message_tree_id": "t",
        "prompt": {
            "role": "prompter",
            "text": "q",
            "replies": [
                {"role": "assistant", "text": "a", "rank": 0, "replies": []},
                {"role": "assistant", "text": "b", "rank": 1, "replies": []},
            ],
        },
    },
    {"input_ids": [5, 6, 7, 8], "prompt_length": 2},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "label": False},
    {"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 6, 8], "prompt_length": 2},
    {"prompt_ids": [5, 6], "completion_ids": [7]},
    {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]},
    {"prompt": ASKED},
)
STEER = {
    "prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 0,
}  # fmt: skip
PAIR_OF_TREE = {"trajectory": [{"from": "user", "value": "q"}], "chosen": "right", "rejected": "wrong"}
STATED: dict[str, tuple[Json, ...]] = {
    "ultrafeedback": ({"instruction": "q", "completions": [
        {"response": "a", "annotations": {"honesty": {"Rating": "1"}}, "overall_score": 10.0}]},),
    "helpsteer": ({"rows": [STEER, {**STEER, "response": "b"}]}, STEER),
    "ultrainteract_trees": ({"rows": [PAIR_OF_TREE, {**PAIR_OF_TREE, "chosen": "also right"}]}, PAIR_OF_TREE),
    "ultrainteract_augmented": ({"rows": [PAIR_OF_TREE, {**PAIR_OF_TREE, "rejected": "very wrong"}]},),
}  # fmt: skip
"""Formats that are never recognised, only stated -> their rows."""
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    2**31,
    2**63,
    10**400,
    1e300,
    -0.0,
    "",
    " ",
    "\u200b",
    "\0",
    "\ufeff",
    "\u2028x",
    "<|im_end|>",
    "user",
    "[",
    "{}",
    '{"a": NaN}',
    "[" * 3000,
    [],
    {},
    [[]],
    [None],
    [1, "x"],
    {"role": "user"},
    [{"role": 1, "content": 2}],
    "x" * 5000,
    {"Rating": []},
    [{"from": "gpt"}],
    [turn("assistant", "a"), turn("assistant", "b")],
    [0] * 50,
    [1.5, 2],
    7,
)
LITERALS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b"null",
    b"{}",
    b"[]",
    b"tru",
    b"01",
    b"'a'",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
)


def text_of(row: Json) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside ``value``."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inside for found in nodes(item, (*path, key)))]


def changed(rng: Random, row: Json) -> Json:
    """``row`` with some fields replaced, removed, renamed or repeated: valid JSON of a doubtful meaning."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = nodes(row)[1:]
        if not paths:
            return row
        *way, last = rng.choice(paths)
        holder: Any = row
        for key in way:
            holder = holder[key]
        kind = rng.randrange(5)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("role", "prompt", "chosen", "label", "x", "weight", "tools", "input_ids"))] = holder[
                last
            ]
        elif kind == 2 and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(rng.choice(holder)))
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
    return row


def truncated(rng: Random, line: bytes) -> bytes:
    return line[: rng.randrange(len(line))]


def flipped(rng: Random, line: bytes) -> bytes:
    made = bytearray(line)
    for _ in range(rng.choice((1, 1, 2, 8))):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def inserted(rng: Random, line: bytes) -> bytes:
    at = rng.randrange(len(line) + 1)
    return line[:at] + rng.choice((*LITERALS, rng.randbytes(rng.randrange(1, 9)), line[at : at + 20])) + line[at:]


def literal(rng: Random, line: bytes) -> bytes:
    """One value replaced by what is no JSON, or hardly."""
    colons = [i for i, byte in enumerate(line) if byte == ord(":")]
    at = rng.choice(colons) + 1
    end = min((found for mark in b",}" if (found := line.find(bytes([mark]), at)) >= 0), default=len(line))
    return line[:at] + rng.choice(LITERALS) + line[end:]


def key_twice(rng: Random, line: bytes) -> bytes:
    return line[:-1] + b", " + line[1:]


def two_on_a_line(rng: Random, line: bytes) -> bytes:
    return line + rng.choice((b"", b" ", b",", b"\x00")) + line


def deep(rng: Random, line: bytes) -> bytes:
    levels = rng.choice((100, 128, 129, 400, 990, 1500)) if rng.random() < 0.95 else 200_000
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inside = opened * levels + b"1" + closed * levels * rng.choice((0, 1, 1))
    return line[:-1] + b', "extra": ' + inside + b"}"


def no_object(rng: Random, line: bytes) -> bytes:
    return rng.choice((b"[" + line + b"]", b"null", b'"row"', b"7"))


def dressed(rng: Random, line: bytes) -> bytes:
    return (
        rng.choice((b"\xef\xbb\xbf", b"\x0c", b" ", b"")) + line + rng.choice((b"\r", b" \t", b"\x00", b"\xef\xbb\xbf"))
    )


MUTATIONS: dict[Callable[[Random, bytes], bytes], int] = {
    truncated: 20, flipped: 25, inserted: 15, literal: 10, key_twice: 3, two_on_a_line: 3, deep: 1, dressed: 3,
    no_object: 1,
}  # fmt: skip


def fuzzed(rng: Random, shapes: tuple[Json, ...] = SHAPES) -> bytes:
    """One line: a tenth of the rows is sound, a third sound JSON of another meaning, the rest damaged bytes."""
    row = rng.choice(shapes)
    draw = rng.random()
    line = text_of(changed(rng, row) if 0.1 < draw < 0.45 else row)
    if draw >= 0.45:
        line = rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0](rng, line)
    line = line.replace(b"\n", b" ")
    return line if line.strip() else b"x"


def write(path: Path, count: int, seed: int, shapes: tuple[Json, ...] = SHAPES) -> Path:
    rng = Random(seed)
    with path.open("wb") as file:
        for _ in range(count):
            file.write(fuzzed(rng, shapes) + b"\n")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "sync_where_possible", lambda path: None)


def test_the_shapes_are_sound_and_of_every_format() -> None:
    found = Counter()
    for number, shape in enumerate(SHAPES, 1):
        sample = to_sample(Row("shapes", number, shape))
        found[recognise(set(shape))] += 1
        assert sample.sequences
    assert set(found) == set(FORMATS.names()) - {"hh", *STATED}, "hh is recognised as preference"


@pytest.mark.parametrize("name", STATED)
def test_formats_of_single_data_sets_read_damaged_rows_or_say_what_is_wrong(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", 1500, seed=4, shapes=STATED[name])
    accepted, refused = 0, {}
    for row in read_rows(str(path), on_error=lambda error: None):
        try:
            sample = to_sample(row, name)
        except DataError as error:
            refused[row.line] = str(error)
            continue
        accepted += 1
        assert len(hashes(sample)) == len(sample.pairs or sample.sequences)
    assert accepted > 150
    assert len(refused) > 50
    for line, said in refused.items():
        assert said.startswith(f"{path}: line {line}: ")
        assert "cannot read this row" not in said, "a fault is named by its key"


def test_100_000_damaged_rows_are_accepted_or_rejected_with_a_reason(tmp_path: Path) -> None:
    count = 100_000
    path = write(tmp_path / "rows.jsonl", count, seed=1)
    rejected: list[RowError] = []
    accepted = dropped = 0
    wants = [(Unit.SEQUENCE, False), (Unit.SEQUENCE, True), (Unit.PAIR, False)]
    wrong_schema: list[tuple[int, str]] = []
    for row in read_rows(str(path), on_error=rejected.append):
        try:
            sample = to_sample(row)
        except DataError as error:
            wrong_schema.append((row.line, str(error)))
            continue
        accepted += 1
        if row.line % 10 == 0:  # accepted rows are as sound the second time
            again = rows.parse(json.dumps(row.value))
            assert to_sample(Row(row.file, row.line, again)) == sample
        unit, labels = wants[row.line % 3]
        try:
            wanted = to_examples(sample, unit, labels=labels)
        except DataError:
            continue
        if fault(wanted) is None:
            assert len(hashes(wanted)) == len(wanted.pairs or wanted.sequences)
        else:
            dropped += 1
    assert accepted + len(wrong_schema) + len(rejected) == count
    assert accepted > count / 20
    assert len(wrong_schema) > count / 20
    assert all(text.startswith(f"{path}: line {line}: ") and "\n" not in text for line, text in wrong_schema)
    assert dropped > 100
    lines = path.read_bytes().split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    for error in rejected:
        assert error.file == str(path)
        assert error.byte == starts[error.line - 1]
        assert str(error) == f"{path}: line {error.line}: {error.detail}"
        assert "\n" not in error.detail
    reasons = Counter(error.reason for error in rejected)
    expected = {"not_utf8", "not_json", "not_an_object", "key_twice", "not_finite", "half_surrogate", "too_deep"}
    assert expected <= set(reasons), reasons


def check_prepared(path: Path, count: int, needs: Needs, encoder: Encoder) -> None:
    """A whole preparation: every row accounted for, with its place and reason, and the index sound."""
    prepared = prepare(DataConfig(path=str(path), max_reject_fraction=1.0), needs, encoder)
    manifest = prepared.manifest
    assert manifest["read"] == count == manifest["kept"] + sum(manifest["dropped"].values())
    assert manifest["kept"] > 0
    entries = [
        json.loads(line) for line in (prepared.folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    whole = [entry for entry in entries if "parts" not in entry]
    assert Counter(entry["reason"] for entry in whole) == manifest["dropped"]
    assert len({entry["line"] for entry in whole}) == len(whole)
    assert all(entry["file"] == str(path) and entry["line"] > 0 and entry["reason"] for entry in entries)
    index = Index.open(prepared.folder / "index")
    index.verify()
    assert len(index) == manifest["samples"] >= manifest["kept"]
    assert (index.num_targets > 0).all()
    for values in (*index.sequence_values.values(), *index.pair_values.values()):
        assert not (values == float("inf")).any()


NEEDS = (
    Needs(Unit.SEQUENCE), Needs(Unit.SEQUENCE, labels=True), Needs(Unit.PAIR), Needs(Unit.PAIR, stage="cpo"),
    Needs(Unit.SEQUENCE, stage="cpsft"),
)  # fmt: skip
IDS = ("demonstrations", "labels", "pairs", "cpo", "cpsft")


@pytest.mark.parametrize("needs", NEEDS, ids=IDS)
def test_damaged_rows_are_prepared_or_listed(needs: Needs, tmp_path: Path) -> None:
    shapes = SHAPES if not needs.stage else tuple(s for s in SHAPES if "completions" in s)
    path = write(tmp_path / "rows.jsonl", 800, seed=2, shapes=shapes)
    check_prepared(path, 800, needs, Encoder(tiny.tokenizer(), max_length=200))


@pytest.mark.nightly
@pytest.mark.parametrize("needs", NEEDS, ids=IDS)
def test_100_000_damaged_rows_are_prepared_or_listed(needs: Needs, tmp_path: Path) -> None:
    shapes = SHAPES if not needs.stage else tuple(s for s in SHAPES if "completions" in s)
    path = write(tmp_path / "rows.jsonl", 20_000, seed=3, shapes=shapes)
    check_prepared(path, 20_000, needs, Encoder(tiny.tokenizer(), max_length=200))


def test_a_line_without_end_is_passed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LARGEST", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 300 + b'"}\n{"a": 2}\n{"a": "' + b"y" * 300)
    errors: list[RowError] = []
    assert [(row.line, row.byte) for row in read_rows(str(path), on_error=errors.append)] == [(1, 0), (3, 319)]
    assert [(e.line, e.byte, e.reason) for e in errors] == [(2, 9, "too_large"), (4, 328, "too_large")]


def test_nesting_ends_at_a_limit_whatever_the_python_stack_holds(tmp_path: Path) -> None:
    def nested(levels: int) -> str:
        return '{"text": "t", "extra": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(nested(levels) + "\n" for levels in (rows.DEEPEST, rows.DEEPEST + 1, 900, 200_000)))
    errors: list[RowError] = []
    assert [row.line for row in read_rows(str(path), on_error=errors.append)] == [1]
    assert [(error.line, error.reason) for error in errors] == [(2, "too_deep"), (3, "too_deep"), (4, "too_deep")]


def test_json_text_inside_a_field_is_read_as_strictly(tmp_path: Path) -> None:
    for field in (
        {"tools": "[" * 100_000},
        {"verify": '{"a": NaN}'},
        {"tools": '[{"a": 1, "a": 2}]'},
        {"tools": ["[1]"]},
    ):
        with pytest.raises(DataError, match=r"f: line 3: key '(tools|verify)'"):
            to_sample(Row("f", 3, {"text": "t", **field}))


def test_a_list_goes_on_behind_a_row_that_is_json_and_ends_at_one_that_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": NaN}, 7, {"a": 1, "a": 2}, {"a": 2},\n {"a": "\\ud800"}, {"a" 3}, {"a": 4}]')
    errors: list[RowError] = []
    assert [(row.line, row.value) for row in read_rows(str(path), on_error=errors.append)] == [
        (1, {"a": 1}),
        (5, {"a": 2}),
    ]
    assert [(e.line, e.reason) for e in errors] == [
        (2, "not_finite"), (3, "not_an_object"), (4, "key_twice"), (6, "half_surrogate"), (2, "not_json"),
    ]  # fmt: skip
    assert "line 2: not JSON" in str(errors[-1])


KEYS = ["role", "content", "from", "value", "response", "Rating", "turns", "success", "text", "replies"]
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "gpt"])
values = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
columns = sorted({name for shape in SHAPES for name in shape})


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(columns), values, max_size=6))
def test_any_object_is_a_sample_or_an_error_with_its_place(row: Json) -> None:
    try:
        sample = to_sample(Row("f.jsonl", 3, row))
    except DataError as error:
        wrong = str(error)
    else:
        wrong = ""
    assert not wrong or wrong.startswith("f.jsonl: line 3: ")
    if wrong:
        return
    for unit, labels in ((Unit.PAIR, False), (Unit.SEQUENCE, False), (Unit.SEQUENCE, True)):
        try:
            wanted = to_examples(sample, unit, labels=labels)
        except DataError:
            continue
        if fault(wanted) is None:
            hashes(wanted)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\n", b" ")), max_size=8))
def test_any_lines_are_rows_or_errors(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        errors: list[RowError] = []
        good = [row.line for row in read_rows(str(path), on_error=errors.append)]
    # A byte order mark in front of the first line is not of the row.
    bare = [line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line for number, line in enumerate(lines, 1)]
    wanted = [number for number, line in enumerate(bare, 1) if line.strip()]
    assert sorted([*good, *(error.line for error in errors)]) == wanted


def test_a_number_that_no_index_can_hold_is_refused() -> None:
    for row in ({"text": "t", "weight": 1e300}, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400}):
        with pytest.raises(DataError, match=r"f: line 3: key '(weight|margin)': must be a number"):
            to_sample(Row("f", 3, row))
