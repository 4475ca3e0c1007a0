"""Random prompt trees with every number a row can have: the rows on which an objective is tried out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from alignlab.data.index import Index, IndexWriter
from alignlab.types import EncodedSample, EncodedSequence

VOCABULARY = 31


def random_sample(rng: np.random.Generator, number: int) -> EncodedSample:
    """A prompt and two to four answers; some share their first tokens, some have a turn of context inside."""
    prompt = rng.integers(1, VOCABULARY, rng.integers(2, 7))
    shared = rng.integers(1, VOCABULARY, 2)
    sequences = []
    for place in range(2 + number % 3):
        answer = np.concatenate((shared[: number % 3], rng.integers(1, VOCABULARY, rng.integers(1, 6))))
        parts, flags = [prompt, answer], [False, True]
        if place == 1:
            parts += [rng.integers(1, VOCABULARY, 3), rng.integers(1, VOCABULARY, 2)]
            flags += [False, True]
        sequences.append(
            EncodedSequence(
                np.concatenate(parts).astype(np.int32), np.repeat(flags, [len(part) for part in parts]).astype(bool)
            )
        )
    pairs = np.array([(a, b) for a in range(len(sequences)) for b in range(a + 1, len(sequences))], dtype=np.int32)
    count = len(sequences)
    return EncodedSample(
        id=str(number),
        source="random",
        sequences=sequences,
        pairs=pairs,
        sequence_values={
            "weight": rng.choice([0.5, 1.0, 2.0], count),
            "label": (np.arange(count) % 2 == 0).astype(float),
            "score/quality": rng.integers(1, 6, count).astype(float),
        },
        pair_values={
            "weight": rng.choice([0.5, 1.0, 2.0], len(pairs)),
            "margin": rng.uniform(0.2, 1.0, len(pairs)),
            "absolute": (np.arange(len(pairs)) % 2 == 0).astype(float),
        },
    )


def write_index(folder: Path, samples: Iterable[EncodedSample]) -> Index:
    """The index of ``samples``, in ``folder``."""
    with IndexWriter(folder) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.close({})
