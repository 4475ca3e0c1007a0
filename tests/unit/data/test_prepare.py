"""From row files to an index: the account, mixtures, held-out shares, and one preparation for all who ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.config import DataConfig, SourceConfig
from alignlab.data import cache
from alignlab.data.prepare import Prepared, prepare
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.errors import DataError
from alignlab.models import tiny
from alignlab.types import Unit

DEMONSTRATIONS = Needs(Unit.SEQUENCE)
PAIRS = Needs(Unit.PAIR, world_kind="pairs")
Write = Callable[..., str]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny.tokenizer(), max_length=200)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "sync_where_possible", lambda path: None)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return make


def asked(number: int, answer: str = "yes") -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": f"question {number}?", "completion": answer}


def ids(prepared: Prepared) -> list[str]:
    return [prepared.index.sample_id(i) for i in range(len(prepared.index))]


def rejected(prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.folder / "rejected.jsonl").read_text().splitlines()]


def test_every_row_is_kept_or_dropped_and_every_drop_is_listed(write: Write, encoder: Encoder) -> None:
    path = write([asked(0), asked(1, " "), asked(2, "long " * 200), asked(3)])
    prepared = prepare(DataConfig(path=path), DEMONSTRATIONS, encoder)
    manifest = prepared.manifest
    assert manifest["dropped"] == {"empty_response": 1, "overlong": 1}
    assert manifest["read"] == manifest["kept"] + sum(manifest["dropped"].values()) == 4
    assert [(r["file"], r["line"], r["id"], r["reason"]) for r in rejected(prepared)] == [
        (path, 2, "r1", "empty_response"),
        (path, 3, "r2", "overlong"),
    ]
    assert "tokens" in rejected(prepared)[1]["detail"]
    assert ids(prepared) == ["r0", "r3"]
    assert manifest["tokens"] == int(prepared.index.lengths.sum())
    assert manifest["target_tokens"] == int(prepared.index.num_targets.sum())
    assert manifest["sources"] == {"rows.jsonl": 2}


def test_a_kept_row_says_which_parts_it_lost(write: Write, encoder: Encoder) -> None:
    scores = [("good", 3), (" ", 2), ("bad " * 100, 1), ("poor", 0)]
    row = {"instruction": "q", "completions": [{"response": r, "overall_score": s} for r, s in scores]}
    prepared = prepare(DataConfig(path=write([row])), PAIRS, encoder)
    assert (prepared.manifest["kept"], prepared.manifest["dropped"]) == (1, {})
    assert prepared.manifest["pairs"] == 1
    # three of the six pairs have the empty answer; one sequence is too long, which takes two more with it
    assert prepared.manifest["parts"] == {"empty_response": 3, "overlong": 1}
    assert sum(r["parts"] for r in rejected(prepared)) == sum(prepared.manifest["parts"].values())


def test_nothing_left_says_why_and_what_to_do(write: Write, encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"no row is left; 1 read, dropped: overlong 1 \(raise data.max_length"):
        prepare(DataConfig(path=write([asked(0, "long " * 200)])), DEMONSTRATIONS, encoder)
    with pytest.raises(DataError, match=r"no row is left; none was read"):
        prepare(DataConfig(path=write([], "empty.jsonl")), DEMONSTRATIONS, encoder)


@pytest.mark.parametrize(
    ("row", "needs", "said"),
    [
        ("{", DEMONSTRATIONS, r"rows\.jsonl: line 2: "),
        ({"prompt": 3, "completion": "a"}, DEMONSTRATIONS, r"rows\.jsonl: line 2: key 'prompt'"),
        (asked(1), PAIRS, r"rows\.jsonl: line 1: row r0: the objective needs pairs"),
        (asked(1), Needs(Unit.PAIR, stage="cpo"), r"rows\.jsonl: line 1: row r0: cpo needs rated"),
    ],
)
def test_a_row_of_the_wrong_schema_stops_at_its_line(
    row: Any, needs: Needs, said: str, write: Write, encoder: Encoder
) -> None:
    with pytest.raises(DataError, match=said):
        prepare(DataConfig(path=write([asked(0), row])), needs, encoder)
    assert not cache.listing(), "nothing half-written"


def test_overlong_error_names_file_and_line(write: Write) -> None:
    strict = Encoder(tiny.tokenizer(), max_length=50, overlong="error")
    with pytest.raises(DataError, match=r"rows\.jsonl: line 2: row r1: \d+ tokens, longer than"):
        prepare(DataConfig(path=write([asked(0), asked(1, "long " * 50)])), DEMONSTRATIONS, strict)


def test_some_malformed_rows_are_allowed_in_each_source_by_share(write: Write, encoder: Encoder) -> None:
    good, bad = [asked(i) for i in range(9)], ["{"]
    prepared = prepare(DataConfig(path=write([*good, *bad]), max_reject_fraction=0.1), DEMONSTRATIONS, encoder)
    assert (prepared.manifest["read"], prepared.manifest["kept"]) == (10, 9)
    assert prepared.manifest["dropped"] == {"not_json": 1}
    sources = [
        SourceConfig(write([*good, *good, *good], "good.jsonl")),
        SourceConfig(write([*bad, asked(9)], "bad.jsonl")),
    ]
    with pytest.raises(DataError, match=r"bad\.jsonl: line 1: .*\(1 rows of .* allows 0\)"):
        prepare(DataConfig(sources=sources, max_reject_fraction=0.1), DEMONSTRATIONS, encoder)


def test_weights_repeat_rows_and_draw_the_fraction_by_seed(write: Write, encoder: Encoder) -> None:
    twice = write([asked(i) for i in range(3)], "twice.jsonl")
    part = write([asked(100 + i) for i in range(200)], "part.jsonl")
    data = DataConfig(sources=[SourceConfig(twice, weight=2.0), SourceConfig(part, weight=0.25)])
    prepared = prepare(data, DEMONSTRATIONS, encoder, seed=1)
    manifest, found = prepared.manifest, ids(prepared)
    assert [found.count(f"r{i}") for i in range(3)] == [2, 2, 2]
    drawn = found[6:]
    assert len(set(drawn)) == len(drawn)
    assert 25 <= len(drawn) <= 75  # 50 expected, 6 standard deviations are 37
    assert manifest["read"] == 203 == manifest["kept"] + manifest["dropped"]["not_drawn"]
    assert prepare(data, DEMONSTRATIONS, encoder, seed=1).fresh is False
    assert ids(prepare(data, DEMONSTRATIONS, encoder, seed=2))[6:] != drawn


TEXTS = [{"text": f"The story {i} begins like all others."} for i in range(60)]
TOKEN_PAIRS = [
    {"chosen_input_ids": [i, 5, 6, n], "rejected_input_ids": [i, 5, 7], "prompt_length": 2}
    for i in range(30)
    for n in (8, 9)
]


@pytest.mark.parametrize(
    ("rows", "needs"),
    [([asked(i) for i in range(60)], DEMONSTRATIONS), (TEXTS, DEMONSTRATIONS), (TOKEN_PAIRS, PAIRS)],
    ids=["prompts", "texts", "token pairs"],
)
def test_a_held_out_share_is_split_by_prompt(rows: list[Any], needs: Needs, write: Write, encoder: Encoder) -> None:
    data = DataConfig(path=write(rows), eval_fraction=0.3)
    train = prepare(data, needs, encoder)
    held = prepare(data, needs, encoder, held_out=True)
    assert train.manifest["read"] + held.manifest["read"] == 60
    assert set(ids(train)).isdisjoint(ids(held))
    assert 6 <= len(held.index) <= 32, "18 expected"
    if rows is TOKEN_PAIRS:
        prompts = [{int(p.index.sample(i).sequences[0].tokens[0]) for i in range(len(p.index))} for p in (train, held)]
        assert prompts[0].isdisjoint(prompts[1]), "equal prompts stay together"


def test_a_share_of_the_built_in_world_is_held_out_of_the_rows_that_train(encoder: Encoder) -> None:
    data = DataConfig(path="sums", eval_fraction=0.5, options={"rows": 40, "eval_rows": 7})
    train = prepare(data, DEMONSTRATIONS, encoder)
    held = prepare(data, DEMONSTRATIONS, encoder, held_out=True)
    assert train.manifest["read"] + held.manifest["read"] == 40
    world = DataConfig(path="sums", eval_path="sums", options={"rows": 40, "eval_rows": 7})
    assert len(prepare(world, DEMONSTRATIONS, encoder, held_out=True).index) == 7


def test_the_same_rows_are_prepared_once_wherever_they_lie(write: Write, encoder: Encoder, tmp_path: Path) -> None:
    path = write([asked(0)])
    (tmp_path / "elsewhere").mkdir()
    copy = write([asked(0)], "elsewhere/rows.jsonl")
    first = prepare(DataConfig(path=path), DEMONSTRATIONS, encoder)
    second = prepare(DataConfig(path=copy), DEMONSTRATIONS, encoder)
    assert (first.fresh, second.fresh) == (True, False)
    assert second.index.hash == first.index.hash
    for other in (DataConfig(path=write([asked(0, "no")])), DataConfig(path=copy, limit=1)):
        assert prepare(other, DEMONSTRATIONS, encoder).fresh
    shorter = Encoder(tiny.tokenizer(), max_length=199)
    assert prepare(DataConfig(path=copy), DEMONSTRATIONS, shorter).fresh


def test_two_preparations_at_once_build_one_index(write: Write, encoder: Encoder) -> None:
    data = DataConfig(path=write([asked(i) for i in range(50)]))
    found: list[Prepared] = []
    barrier = threading.Barrier(3)

    def work() -> None:
        barrier.wait()
        found.append(prepare(data, DEMONSTRATIONS, encoder))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(prepared.fresh for prepared in found) == [False, False, True]
    assert len({prepared.index.hash for prepared in found}) == 1
    assert len(cache.listing()) == 1
