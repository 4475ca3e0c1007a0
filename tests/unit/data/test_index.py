"""The index gives back what was written, or says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignlab.data import trie
from alignlab.data.index import Index, IndexWriter
from alignlab.errors import DataError, StorageError
from alignlab.types import EncodedSample, EncodedSequence, Unit


def sample(name: str = "a", **changes: object) -> EncodedSample:
    made = EncodedSample(
        id=name,
        source="x",
        sequences=[
            EncodedSequence(np.array([5, 6, 7], np.int32), np.array([False, False, True])),
            EncodedSequence(np.array([5, 8], np.int32), np.array([False, True])),
        ],
        pairs=np.array([[0, 1]], np.int32),
        sequence_values={"weight": np.ones(2)},
        pair_values={"weight": np.ones(1)},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    scored = sample(
        "zwei",
        source="y",
        sequence_values={"weight": np.array([2.0, 3.0]), "score/helpfulness": np.array([4.0, 1.0])},
        pair_values={"weight": np.array([0.5]), "margin": np.array([0.25])},
    )
    with IndexWriter(tmp_path / "index") as writer:
        writer.add(sample("ä"))
        writer.add(scored)
        index = writer.close({"template": "t"})
    assert not [path for path in tmp_path.iterdir() if path.name != "index"]
    assert (len(index), index.num_sequences, index.meta) == (2, 4, {"template": "t"})
    assert (index.ids, index.sources) == (["ä", "zwei"], ["x", "y"])
    assert (index.example_count(Unit.PAIR), index.example_count(Unit.SEQUENCE)) == (2, 4)
    again = index.sample(1)
    for ours, theirs in zip(scored.sequences, again.sequences, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.target, theirs.target)
    np.testing.assert_array_equal(again.pairs, [[0, 1]])
    np.testing.assert_array_equal(again.sequence_values["score/helpfulness"], [4.0, 1.0])
    # What the first sample did not have is filled in, though the name came later.
    first = index.sample(0)
    assert np.isnan(first.sequence_values["score/helpfulness"]).all()
    np.testing.assert_array_equal(first.pair_values["margin"], [0.0])
    np.testing.assert_array_equal(index.lengths, [3, 2, 3, 2])
    np.testing.assert_array_equal(index.num_targets, [1, 1, 1, 1])
    np.testing.assert_array_equal(index.prompt_lengths, [2, 1, 2, 1])


def test_tree_tokens_are_those_of_the_trie(make_index: Callable[..., Index]) -> None:
    index = make_index(20, most=5)
    for mixes in (False, True):
        built = [len(trie.build(one.sequences, mixes).tokens) for one in index]
        np.testing.assert_array_equal(index.tree_tokens(mixes), built)


def test_equal_prompts_have_equal_hashes(tmp_path: Path) -> None:
    other = [EncodedSequence(np.array([5, 6, 9, 9], np.int32), np.array([False, False, True, True]))]
    longer = [EncodedSequence(np.array([5, 6, 9, 9], np.int32), np.array([False, False, False, True]))]
    none = np.zeros((0, 2), np.int32)
    with IndexWriter(tmp_path / "index") as writer:
        writer.add(sample("a"))
        for sequences in (other, longer):
            writer.add(sample("b", sequences=sequences, pairs=none, sequence_values={}, pair_values={}))
        index = writer.close()
    assert index.prompt_hash[0] == index.prompt_hash[1] != index.prompt_hash[2]


def test_hash_is_of_what_changes_numbers(tmp_path: Path) -> None:
    def hash_of(name: str, *samples: EncodedSample) -> str:
        with IndexWriter(tmp_path / name) as writer:
            for one in samples:
                writer.add(one)
            return writer.close().hash

    plain = hash_of("a", sample())
    assert hash_of("b", sample("other name", source="other")) == plain
    assert hash_of("c", sample(pair_values={"weight": np.array([0.5])})) != plain
    assert hash_of("d", sample(pairs=np.array([[1, 0]], np.int32))) != plain
    assert hash_of("e", sample(), sample()) != plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": []}, "no sequence"),
        ({"sequences": [EncodedSequence(np.array([1, 2]), np.array([True, True]))] * 2}, "first token"),
        ({"sequences": [EncodedSequence(np.array([1, 2]), np.array([0, 1]))] * 2}, "booleans"),
        ({"sequences": [EncodedSequence(np.array([1, -2]), np.array([False, True]))] * 2}, "negative"),
        ({"sequences": [EncodedSequence(np.zeros(0, int), np.zeros(0, bool))] * 2}, "at least one token"),
        ({"pairs": np.array([[0, 2]])}, "two different sequences"),
        ({"pairs": np.array([[1, 1]])}, "two different sequences"),
        ({"pairs": np.zeros(0, int)}, "not \\[P, 2\\]"),
        ({"pair_values": {"margin": np.zeros(3)}}, "'margin' has the shape"),
        ({"sequence_values": {"weight": np.array([1.0, np.nan])}}, "not finite"),
    ],
)
def test_impossible_samples_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    def write() -> None:
        with IndexWriter(tmp_path / "index") as writer:
            writer.add(sample("bad", **change))

    with pytest.raises(DataError, match=f"sample 'bad': .*{message}"):
        write()
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_damage_is_found(make_index: Callable[..., Index]) -> None:
    index = make_index(4)
    index.verify()
    tokens = index.folder / "tokens.bin"
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-4] + b"\x01\x02\x03\x04")
    with pytest.raises(StorageError, match=r"tokens\.bin: damaged"):
        Index.open(index.folder).verify()
    tokens.write_bytes(data[:-1])
    with pytest.raises(StorageError, match=r"tokens\.bin: .* bytes where"):
        Index.open(index.folder)
    tokens.unlink()
    with pytest.raises(StorageError, match=r"tokens\.bin: -1 bytes"):
        Index.open(index.folder)
    (index.folder / "meta.json").write_text("{")
    with pytest.raises(StorageError, match="not a readable index"):
        Index.open(index.folder)


def test_selection_and_attached_numbers(make_index: Callable[..., Index]) -> None:
    index = make_index(6)
    chosen = index.select([4, 1, 4]).select([0, 1, 2, 0])
    assert chosen.ids == ["row-4", "row-1", "row-4", "row-4"]
    assert [one.id for one in chosen] == chosen.ids
    assert chosen.example_count(Unit.SEQUENCE) == sum(len(one.sequences) for one in chosen)
    assert len({index.hash, chosen.hash, index.select([4, 1]).hash, index.select([1, 4]).hash}) == 4
    chosen.attach("reference", np.arange(index.num_sequences, dtype=np.float64))
    np.testing.assert_array_equal(
        index.sample(1).sequence_values["reference"], np.arange(*index.sample_ptr[1:3].tolist())
    )
    assert "reference" not in Index.open(index.folder).attached
    with pytest.raises(ValueError, match="shape"):
        index.attach("reference", np.zeros(1))


def test_an_index_without_samples_opens(tmp_path: Path) -> None:
    index = IndexWriter(tmp_path / "index").close()
    assert (len(index), index.num_sequences, list(index.pair_values)) == (0, 0, ["weight"])
