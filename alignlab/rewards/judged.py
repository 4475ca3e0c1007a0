"""Rewards of rows beside what is known of the rows: which answer is better, how good each is, what it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alignlab.data import trie
from alignlab.data.examples import rating
from alignlab.data.index import Index

SCORE = "score/"
NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Judged:
    """S sequences and P pairs of them, in stored numbers of the index they come from."""

    rewards: np.ndarray
    """float64 [S]; NaN where a sequence belongs to no row that was looked at"""
    lengths: np.ndarray
    """int64 [S]: tokens of the answer (targets; the prompt is not in it)"""
    quality: np.ndarray
    """float64 [S]: how good the answer is known to be (the mean of its ratings); NaN where nobody says"""
    pools: np.ndarray
    """int64 [S]: equal for rated answers to one prompt of one row; -1 for the others"""
    pairs: np.ndarray
    """int64 [P, 2]: (chosen, rejected), into the sequences"""
    samples: np.ndarray
    """int64 [P]: the row that each pair belongs to"""
    prompts: np.ndarray
    """int64 [P]: equal for pairs of one prompt; a whole tree counts as one prompt"""
    categories: np.ndarray
    """str [P]"""
    ids: dict[int, str]
    """the ids of the rows in ``samples``"""

    @property
    def margins(self) -> np.ndarray:
        """float64 [P]: the chosen answer's reward minus the rejected one's."""
        both = self.rewards[self.pairs]
        return both[:, 0] - both[:, 1]

    @property
    def length_differences(self) -> np.ndarray:
        """int64 [P]: tokens of the chosen answer minus those of the rejected one."""
        both = self.lengths[self.pairs]
        return both[:, 0] - both[:, 1]

    def by_pair(self) -> Iterator[dict[str, Any]]:
        """Each pair: its row's id and category, both rewards, both lengths in tokens."""
        for (chosen, rejected), sample, category in zip(self.pairs, self.samples, self.categories, strict=True):
            yield {
                "id": self.ids[int(sample)], "category": str(category),
                "reward_chosen": float(self.rewards[chosen]), "reward_rejected": float(self.rewards[rejected]),
                "tokens_chosen": int(self.lengths[chosen]), "tokens_rejected": int(self.lengths[rejected]),
            }  # fmt: skip

    def only(self, chosen: np.ndarray) -> Judged:
        """The same sequences with these pairs (a mask or numbers)."""
        return replace(
            self, pairs=self.pairs[chosen], samples=self.samples[chosen], prompts=self.prompts[chosen],
            categories=self.categories[chosen],
        )  # fmt: skip


def judge(index: Index, rewards: np.ndarray, by: Sequence[str] = ()) -> Judged:
    """``rewards`` (float64 [stored sequences]) with what ``index`` knows of its selection's rows.

    A pair's category is what its row states, else the row's source.  ``by``: the ratings that make the quality.
    """
    rows = index.rows
    counts = (index.pair_ptr[rows + 1] - index.pair_ptr[rows]).astype(np.int64)
    samples = np.repeat(rows, counts)
    numbers = trie.ranges(index.pair_ptr[rows], index.pair_ptr[rows + 1])
    pairs = index.pairs[numbers].astype(np.int64) + index.sample_ptr[samples][:, None]
    names = np.array([index.category(row) or index.source(row) or NO_CATEGORY for row in rows.tolist()], dtype=object)
    _, prompts = np.unique(index.prompt_hash[samples], return_inverse=True)
    quality = _quality(index, by)
    return Judged(
        rewards=np.asarray(rewards, dtype=np.float64), lengths=index.num_targets.astype(np.int64), quality=quality,
        pools=_pools(index, quality), pairs=pairs, samples=samples, prompts=prompts.astype(np.int64),
        categories=np.repeat(names, counts).astype(str) if len(names) else np.zeros(0, dtype=str),
        ids={row: index.sample_id(row) for row in rows.tolist()},
    )  # fmt: skip


def _quality(index: Index, by: Sequence[str]) -> np.ndarray:
    found = np.full(index.num_sequences, np.nan)
    ratings = {n.removeprefix(SCORE): a for n, a in index.sequence_values.items() if n.startswith(SCORE)}
    for number in range(index.num_sequences) if ratings else ():
        said = {name: float(values[number]) for name, values in ratings.items() if not np.isnan(values[number])}
        value = rating(said, by)
        found[number] = np.nan if value is None else value
    return found


def _pools(index: Index, quality: np.ndarray) -> np.ndarray:
    pools = np.full(index.num_sequences, -1, dtype=np.int64)
    known: dict[tuple[int, bytes], int] = {}
    for row in index.rows.tolist():
        for number in range(int(index.sample_ptr[row]), int(index.sample_ptr[row + 1])):
            if not np.isnan(quality[number]):
                prompt = index.sequence(number).tokens[: int(index.prompt_lengths[number])].tobytes()
                pools[number] = known.setdefault((row, prompt), len(known))
    return pools
