"""Rows encoded by several processes are those encoded by one: the same bytes, the same errors, nothing left behind."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignlab import pids
from alignlab.config import DataConfig
from alignlab.data import cache, encode_child, encoding
from alignlab.data.encode_child import Outcome, as_sample, as_value, message, pack, receive, unpack
from alignlab.data.encoding import encoded
from alignlab.data.plain_tokenizer import PlainTokenizer, describe
from alignlab.data.prepare import Prepared, prepare
from alignlab.data.sources import Needs
from alignlab.data.template import Dropped, Encoder
from alignlab.errors import DataError, OutOfMemoryError
from alignlab.models import tiny
from alignlab.types import EncodedSample, EncodedSequence, Pair, Sample, Sequence, Unit

WORDS = ("ja", "<|im_end|>", "naïve", "🙂", "  two  spaces", "\n\n", "<think>x</think>", "Ünï", "")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "sync_where_possible", lambda path: None)
    monkeypatch.setattr(encoding, "ALONE", 40)
    monkeypatch.setattr(encoding, "CHUNK", 8)


def encoder(**policies: Any) -> Encoder:
    return Encoder(tiny.tokenizer(), **{"max_length": 120, **policies})


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of every kind that a preparation treats in a way of its own."""
    rng = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    for number in range(count):
        said = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
        kind = number % 9
        row: dict[str, Any] = {"id": f"r{number}", "prompt": [{"role": "user", "content": f"{number}? {said}"}]}
        answer = "ok " * (60 if kind == 1 else 2) + said
        if kind == 2:
            answer = " "
        if kind == 3:
            row["prompt"].insert(0, {"role": "system", "content": "Be brief."})
        if kind == 4:
            row["prompt"] = f"plain {number}"
            row["completion"] = "text"
        else:
            row["completion"] = [{"role": "assistant", "content": answer}]
        if kind == 5:
            row["prompt"] += [{"role": "assistant", "content": "why"}, {"role": "user", "content": said or "x"}]
        made.append(row)
    return made


def asked(number: int, answer: str = "yes") -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{number}?"}], [{"role": "assistant", "content": answer}]
    return {"id": f"r{number}", "prompt": turns[0], "completion": turns[1]}


def prepared(rows: list[Any], folder: Path, processes: int | None, **settings: Any) -> Prepared:
    os.environ["ALIGNLAB_CACHE"] = str(folder / f"cache-{processes}")
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    needs = settings.pop("needs", Needs(Unit.SEQUENCE))
    policies = {name: settings.pop(name) for name in ("overlong",) if name in settings}
    return prepare(DataConfig(path=str(path), num_proc=processes, **settings), needs, encoder(**policies))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", "set by prepared()")


def test_the_same_bytes_as_one_process_writes(tmp_path: Path) -> None:
    made = [prepared(rows(260), tmp_path, processes) for processes in (1, 2)]
    one, two = (
        {str(path.relative_to(each.folder)): path.read_bytes() for path in each.folder.rglob("*") if path.is_file()}
        for each in made
    )
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert made[0].index.hash == made[1].index.hash
    dropped = made[0].manifest["dropped"]
    assert dropped["overlong"] > 20
    assert dropped["empty_response"] > 20
    assert made[0].folder.name == made[1].folder.name  # the number of processes is no part of the key


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"id": "x", "prompt": 3}, r"rows.jsonl: line 121: key 'prompt'"),
        (asked(0, "long " * 200), r"rows.jsonl: line 121: row r0: \d+ tokens, longer than data.max_length"),
    ],
)
def test_the_first_faulty_row_is_named_whoever_meets_it(tmp_path: Path, fault: Any, message: str) -> None:
    """The first is found before a row is encoded, the second in a process that encodes, and a later row is no JSON."""
    faulty = [*(asked(n) for n in range(120)), fault, *(asked(n) for n in range(40)), "{later too"]
    found = []
    before, threads = children(), set(threading.enumerate())
    for processes in (1, 2):
        with pytest.raises(DataError, match=message) as caught:
            prepared(faulty, tmp_path, processes, overlong="error")
        found.append(str(caught.value))
        assert not cache.listing()
        assert len(children() - before) <= 1  # what renders templates here; the error's traceback holds nobody back
        assert set(threading.enumerate()) == threads
        assert [path.name for path in (tmp_path / f"cache-{processes}" / "index").iterdir()] == []
    assert found[0] == found[1]


def test_faulty_rows_that_are_allowed_are_listed_in_their_order(tmp_path: Path) -> None:
    faulty = [*rows(90), "{no", *rows(30), '{"id": "x", "prompt": 3}', *rows(30)]
    listed = []
    for processes in (1, 2):
        made = prepared(faulty, tmp_path, processes, max_reject_fraction=0.1)
        listed.append((made.folder / "rejected.jsonl").read_text())
        places = [json.loads(line)["line"] for line in listed[-1].splitlines()]
        assert places == sorted(places)
    assert listed[0] == listed[1]
    assert '"not_json"' in listed[0]
    assert '"wrong_schema"' in listed[0]


def test_conditions_are_drawn_in_the_order_of_the_rows(tmp_path: Path) -> None:
    scored = [
        {
            "instruction": f"q {number}",
            "completions": [
                {"response": f"a {place}", "annotations": {"helpfulness": (number + place) % 5 + 1}}
                for place in range(3)
            ],
        }
        for number in range(120)
    ]
    made = [prepared(scored, tmp_path, n, needs=Needs(Unit.PAIR, stage="cpo")) for n in (1, 2)]
    assert made[0].index.hash == made[1].index.hash
    assert made[0].manifest == made[1].manifest
    assert made[0].manifest["conditions"]


def test_small_inputs_and_one_process_start_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(encoding, "_Child", refuse)
    assert prepared(rows(40), tmp_path, 4).manifest["read"] == 40
    assert prepared(rows(90), tmp_path, 1).manifest["read"] == 90
    with pytest.raises(AssertionError):
        prepared(rows(41), tmp_path, 2)


# ---------------------------------------------------------------------------------------------------------------
# The processes
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    samples: list[Sample]
    outcomes: list[Outcome] = field(default_factory=list)


def sample(number: int, **more: Any) -> Sample:
    turns = [{"role": "user", "content": f"q {number}"}]
    return Sample([Sequence(turns, [{"role": "assistant", "content": "a", **more}])], id=str(number))


def children() -> set[str]:
    """Processes that this one has started and that are still there."""
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return set(listed.read_text().split()) if listed.exists() else set()


def test_memory_is_bounded_and_order_kept() -> None:
    """Of a long input no more is taken than two chunks a process and the one in hand, whatever is slow."""
    taken = 0

    def source() -> Any:
        nonlocal taken
        for number in range(400):
            taken += 1
            yield Asked([sample(number)] * (number % 3))

    before, threads = children(), set(threading.enumerate())
    results = encoded(source(), encoder(), 2)
    for number, one in enumerate(results):
        assert [found.id for found, _ in one.outcomes] == [str(number)] * (number % 3)  # type: ignore[union-attr]
        assert taken <= number + 1 + (2 * 2 + 2) * 8
        if number == 100:
            assert len(children() - before) >= 2
        if number == 200:
            break
    results.close()
    assert taken < 300
    assert set(threading.enumerate()) == threads
    assert len(children() - before) <= 1  # what renders templates here


def test_a_process_that_is_killed_ends_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    child = encoding._Child

    def watched(options: Any) -> Any:
        started.append(child(options))
        return started[-1]

    monkeypatch.setattr(encoding, "_Child", watched)
    results = encoded((Asked([sample(number)]) for number in range(10**6)), encoder(), 2)

    def consume() -> None:
        for number, _ in enumerate(results):
            if number == 60:
                os.kill(started[0]._process.pid, signal.SIGKILL)

    with pytest.raises(OutOfMemoryError, match=r"signal 9.*data.num_proc"):
        consume()
    assert all(one._process.poll() is not None for one in started)


PARENT = """
import json, sys, time
from alignlab.data.encoding import _Child
children = [_Child(json.loads(sys.stdin.readline())) for _ in range(1)]
print(*(child._process.pid for child in children), flush=True)
time.sleep(60)
"""


def test_no_process_outlives_a_parent_that_is_killed() -> None:
    own = encoder()
    options = {"tokenizer": describe(own.tokenizer), "template": None, "named": "x", "policies": own.policies}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(json.dumps(options) + "\n")
    parent.stdin.flush()
    numbers = [int(word) for word in parent.stdout.readline().split()]
    assert numbers
    assert not any(pids.gone(number) for number in numbers)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while not all(pids.gone(number) for number in numbers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(pids.gone(number) for number in numbers)


def test_what_json_cannot_hold_is_encoded_here() -> None:
    odd = sample(0, name={"since": datetime.date(2024, 1, 1)})
    results = list(encoded((Asked([odd if n == 50 else sample(n)]) for n in range(60)), encoder(), 2))
    (found, _) = results[50].outcomes[0]
    assert isinstance(found, EncodedSample)


def test_errors_name_the_template_as_here(tmp_path: Path) -> None:
    """A template that its user gave as a file is called by that file's name."""
    file = tmp_path / "mine.jinja"
    file.write_text("{% if 'boom' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + (encoder().template or ""))
    broken = sample(0)
    broken.sequences[0].prompt = [{"role": "user", "content": "boom"}]
    rows = [Asked([broken if n in (0, 50) else sample(n)]) for n in range(60)]
    results = list(encoded(rows, encoder(chat_template=str(file)), 2))
    here, there = (str(results[n].outcomes[0][0]) for n in (0, 50))
    assert here == there
    assert "the chat template mine#" in here


def test_a_bug_in_a_process_is_raised_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = sample(0)
    broken.sequences[0].completion = [7]  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="AttributeError"):
        list(encoded((Asked([broken if n == 50 else sample(n)]) for n in range(60)), encoder(), 2))


# ---------------------------------------------------------------------------------------------------------------
# What travels
# ---------------------------------------------------------------------------------------------------------------


class Pipe:
    """Bytes as a stream gives them."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, count: int) -> bytes:
        found, self.data = self.data[:count], self.data[count:]
        return found


def test_samples_travel_whole() -> None:
    turns = [{"role": "user", "content": "é\ud800\u2028"}]
    one = Sample(
        [Sequence(turns, [{"role": "assistant", "content": "a"}], label=True, scores={"x": 0.1 + 0.2}, weight=1 / 3)],
        [Pair(0, 0, 0.5, True, 2.0)], id="i", source="s", tools=[{"a": 1}], category="c",
    )  # fmt: skip
    stream = Pipe(message([as_value(one)]))
    (values, arrays) = receive(stream)  # type: ignore[arg-type,misc]
    assert as_sample(values[0]) == one
    assert arrays == []
    assert stream.data == b""


@pytest.mark.parametrize("cut", [0, 4, 9, 300, -1])
def test_half_a_message_is_none(cut: int) -> None:
    whole = message({"a": "b" * 400}, [np.arange(9)])
    assert receive(Pipe(whole[:cut])) is None  # type: ignore[arg-type]


def test_outcomes_travel_whole() -> None:
    sequences = [
        EncodedSequence(np.array([1, 2, 3], np.int32), np.array([False, True, True]), np.array([0, 1, 2], np.uint8)),
        EncodedSequence(np.array([4], np.int32), np.array([False])),
    ]
    kept = EncodedSample(
        "i", "s", sequences, np.array([[0, 1]], np.int32), {"weight": np.array([1, np.nan], np.float32)},
        {"margin": np.array([0.5], np.float32)}, "c",
    )  # fmt: skip
    empty = EncodedSample("j", "s", sequences[1:], np.zeros((0, 2), np.int32), {}, {})
    outcomes: list[Outcome] = [
        (kept, Counter({"overlong": 2})), (Dropped("no_target", "x"), Counter()), (empty, Counter()),
        (DataError("bad"), Counter()),
    ]  # fmt: skip
    packed = [pack(one) for one in outcomes]
    stream = Pipe(message([value for value, _ in packed], [array for _, own in packed for array in own]))
    values, arrays = receive(stream)  # type: ignore[arg-type,misc]
    found = [unpack(value, arrays) for value in values]
    assert arrays == []
    assert [lost for _, lost in found] == [lost for _, lost in outcomes]
    assert found[1][0] == Dropped("no_target", "x")
    assert type(found[3][0]) is DataError
    assert str(found[3][0]) == "bad"
    for ours, theirs in ((kept, found[0][0]), (empty, found[2][0])):
        assert (theirs.id, theirs.source, theirs.category) == (ours.id, ours.source, ours.category)  # type: ignore[union-attr]
        np.testing.assert_array_equal(theirs.pairs, ours.pairs)  # type: ignore[union-attr]
        np.testing.assert_equal(theirs.sequence_values, ours.sequence_values)  # type: ignore[union-attr]
        np.testing.assert_equal(theirs.pair_values, ours.pair_values)  # type: ignore[union-attr]
        for a, b in zip(ours.sequences, theirs.sequences, strict=True):  # type: ignore[union-attr]
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.target, b.target)
            np.testing.assert_equal(a.roles, b.roles)
            assert (a.tokens.dtype, a.target.dtype) == (b.tokens.dtype, b.target.dtype)


def test_the_plain_tokenizer_is_the_tokenizer() -> None:
    tokenizer = tiny.tokenizer()
    described = describe(tokenizer)
    assert described is not None
    plain = PlainTokenizer(json.loads(json.dumps(described)))
    texts = [" ".join(WORDS), *WORDS, tokenizer.eos_token * 2, "a" + tokenizer.eos_token + "b"]
    for text in texts:
        for special in (False, True):
            for split in (False, True):
                ours = plain(text, add_special_tokens=special, split_special_tokens=split)
                theirs = tokenizer(
                    text, add_special_tokens=special, split_special_tokens=split, return_offsets_mapping=True
                )
                assert ours["input_ids"] == theirs["input_ids"]
                assert [tuple(one) for one in ours["offset_mapping"]] == [
                    tuple(one) for one in theirs["offset_mapping"]
                ]
                kept = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
                assert plain.decode(ours["input_ids"], **kept) == tokenizer.decode(ours["input_ids"], **kept)
    own, other = Encoder(tokenizer, max_length=99), Encoder(plain, max_length=99)
    assert other.stop_ids == own.stop_ids
    assert other.template == own.template
    assert other.markup == own.markup


def test_a_tokenizer_with_ways_of_its_own_is_not_described() -> None:
    tokenizer = tiny.tokenizer()
    kind = type(tokenizer)
    tokenizer.__class__ = type("Own", (kind,), {"_encode_plus": lambda self, *a, **k: kind._encode_plus(self, *a, **k)})
    assert describe(tokenizer) is None
    assert describe(object()) is None


def test_the_process_needs_neither_torch_nor_transformers() -> None:
    """A second and some hundred megabytes a process."""
    code = f"import sys; import {encode_child.__name__}; print({{'torch', 'transformers'}} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


MEASURED = """
import json, resource, sys
from alignlab.config import DataConfig
from alignlab.data.prepare import prepare
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.models import tiny
from alignlab.types import Unit

made = prepare(DataConfig(path=sys.argv[1], num_proc=2), Needs(Unit.SEQUENCE), Encoder(tiny.tokenizer()))
print(made.manifest["kept"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A row is 1 kB of text and 5 kB of token ids: 8,000 more in memory would be 48 MB.  Half is allowed: what
    is written in groups of rows takes some, whatever their number."""
    peaks = []
    for count in (2000, 10000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                file.write(json.dumps(asked(number, f"{number} is what was meant " * 40)) + "\n")
        environment = {**os.environ, "ALIGNLAB_CACHE": str(tmp_path / f"cache-{count}")}
        words = [sys.executable, "-c", MEASURED, str(path)]
        told = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.split()
        assert int(told[0]) == count
        peaks.append(int(told[1]) / 1024)
    assert peaks[1] - peaks[0] < 24
