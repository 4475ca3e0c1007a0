"""What choosing among several sampled answers is worth: best of n by a scorer, majority vote, against greedy.

Each prompt has a pool of n sampled answers of measured quality.  UltraMedical (arXiv 2406.03949) compares greedy
decoding, self-consistency (the majority vote of arXiv 2203.11171) and the answer that its reward model ranks first.
Everything is a mean over prompts, and two ways of choosing are compared on the same pools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from alignlab.errors import DataError
from alignlab.rewards.intervals import Draws, mean
from alignlab.rewards.pools import expected_best

GREEDY, RANDOM, MAJORITY, ORACLE = "greedy", "random", "majority", "oracle"


@dataclass(frozen=True)
class Pool:
    """One prompt's n sampled answers, and the greedy one."""

    quality: Sequence[float]
    """[n] how good each answer is, measured (1 right, 0 wrong)"""
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """scorer -> [n]; None where an answer could not be scored, which is then the last to be chosen"""
    votes: Sequence[str | None] | None = None
    """[n] what each answer says in the end; None: nothing that can be read.  None for all: nobody can read votes"""
    greedy: float | None = None
    """quality of the greedy answer"""


def ways(pools: Sequence[Pool], draws: Draws) -> dict[str, Any]:
    """``{prompts, n, ways, differences, curves}`` of pools of one size; figures are ``{value, low, high, method}``.

    ``ways``: ``greedy``, ``random`` (one sampled answer), ``majority``, ``best/<scorer>``, ``oracle``.  Where several
    answers are first (equal scores, equal votes) each of them is as likely as the others to be taken, in closed form.
    ``differences``: each pair of neighbours in that order, and every way against greedy, on the same draw of prompts.
    ``curves``: ``<scorer>`` -> ``{k: mean quality of the best of k}`` for k = 1, 2, 4, ... n, over all subsets of k.
    """
    sizes = {len(pool.quality) for pool in pools}
    if len(sizes) != 1 or sizes == {0}:
        raise DataError(f"re-ranking compares pools of one size, these have {sorted(sizes) or 'none'}")
    n = sizes.pop()
    prompts = np.arange(len(pools))
    chosen = dict(_chosen(pools, n))
    counts = [*(2**power for power in range(n.bit_length()) if 2**power < n), n]
    return {
        "prompts": len(pools),
        "n": n,
        "ways": {name: mean(values, prompts, draws).as_json() for name, values in chosen.items()},
        "differences": {
            f"{one} - {other}": mean(chosen[one] - chosen[other], prompts, draws).as_json()
            for one, other in _compared([*chosen])
        },
        "curves": {
            name: {str(k): float(np.mean([_best(pool, name, k) for pool in pools])) for k in counts}
            for name in pools[0].scores
        },
    }


def _chosen(pools: Sequence[Pool], n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Way -> float64 [prompts]: the expected quality of the answer that it takes."""
    if all(pool.greedy is not None for pool in pools):
        yield GREEDY, np.array([pool.greedy for pool in pools], dtype=np.float64)
    yield RANDOM, np.array([np.mean(pool.quality) for pool in pools])
    if all(pool.votes is not None for pool in pools):
        yield MAJORITY, np.array([majority(pool.quality, pool.votes or ()) for pool in pools])
    for name in pools[0].scores:
        yield f"best/{name}", np.array([_best(pool, name, n) for pool in pools])
    yield ORACLE, np.array([max(pool.quality) for pool in pools], dtype=np.float64)


def _compared(names: list[str]) -> list[tuple[str, str]]:
    """Every way minus greedy (minus random, where there is no greedy answer), and each way minus the one before it."""
    first, *others = names
    neighbours = [(later, earlier) for earlier, later in pairwise(others)]
    return [*((name, first) for name in others), *(pair for pair in neighbours if pair[0] != ORACLE)]


def majority(quality: Sequence[float], votes: Sequence[str | None]) -> float:
    """The expected quality of an answer with the most frequent vote; of any answer where none has a vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return float(np.mean(quality))
    most = max(counts.values())
    first = [vote for vote, count in counts.items() if count == most]
    return float(np.mean([np.mean([q for q, v in zip(quality, votes, strict=True) if v == vote]) for vote in first]))


def _best(pool: Pool, scorer: str, k: int) -> float:
    scores = np.array([-np.inf if score is None else score for score in pool.scores[scorer]], dtype=np.float64)
    return expected_best(scores, np.asarray(pool.quality, dtype=np.float64), k)


def table_text(found: Mapping[str, Any]) -> list[str]:
    """The figures as lines to read."""
    first = next(iter(found["ways"]))
    width = max(len(name) for name in found["ways"])
    lines = [f"{'chosen by':<{width}}  {'mean':>6}  {'95 % interval':<16}  minus {first}"]
    for name, figure in found["ways"].items():
        difference = found["differences"].get(f"{name} - {first}")
        more = "" if difference is None else f"{difference['value']:+.3f} {_ends(difference, '+.3f')}"
        lines.append(f"{name:<{width}}  {figure['value']:>6.3f}  {_ends(figure, '.3f'):<16}  {more}".rstrip())
    for name, curve in found["curves"].items():
        lines.append(f"best of  {', '.join(f'{k}: {value:.3f}' for k, value in curve.items())}   by {name}")
    return lines


def _ends(figure: Mapping[str, Any], form: str) -> str:
    return f"[{figure['low']:{form}}, {figure['high']:{form}}]"
