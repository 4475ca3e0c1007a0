"""Figures of verdicts: win rate, ratings, and what a judge follows besides the answers: their order, their length.

Prompts are what is drawn for every interval (:mod:`alignlab.rewards.intervals`).  A prompt counts only where every
verdict on it could be read; the others are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from alignlab.judges.templates import Ranking
from alignlab.measuring.control import spearman
from alignlab.rewards.intervals import Draws, accuracy, mean


@dataclass(frozen=True)
class Compared:
    """Two answers to one prompt.  ``forward`` and ``swapped``: 1 where the *first side's* answer is better, 0 where the
    second's is, 0.5 for a tie, None where the verdict could not be read; they differ in which one was shown first.

    Answers that are the same text are a tie that nobody was asked about (``asked`` False).
    """

    forward: float | None
    swapped: float | None
    lengths: tuple[int, int]
    asked: bool = True

    @property
    def outcome(self) -> float | None:
        """The mean over both orders; None where one is missing."""
        if self.forward is None or self.swapped is None:
            return None
        return (self.forward + self.swapped) / 2


def win_rate(found: Sequence[Compared], draws: Draws) -> dict[str, Any]:
    """The first side's win rate (a tie is half a win), with the judge's biases of position and length.

    ``position``: the share of prompts whose verdict changes with the order, and the share of verdicts (ties aside) for
    the answer shown first, 0.5 without bias.  ``length``: characters of winners and losers, and how often the longer
    answer wins.
    """
    whole = [one for one in found if one.outcome is not None]
    outcomes = np.array([one.outcome for one in whole])
    asked = [one for one in whole if one.asked]
    changed = np.array([float(one.forward != one.swapped) for one in asked])
    # The first side is shown first in the forward order, the second side in the swapped one.
    for_first = [v for one in found if one.asked for v in (one.forward, _turned(one.swapped)) if v not in (None, 0.5)]
    decided = [one for one in whole if one.outcome != 0.5]
    unequal = [one for one in decided if one.lengths[0] != one.lengths[1]]
    longer = np.array([float((one.lengths[0] > one.lengths[1]) == (one.outcome > 0.5)) for one in unequal])  # type: ignore[operator]
    sides = [(one.lengths if one.outcome > 0.5 else one.lengths[::-1]) for one in decided]  # type: ignore[operator]
    return {
        "prompts": len(whole),
        "incomplete": len(found) - len(whole),
        "unparsable": sum((one.forward is None) + (one.swapped is None) for one in found),
        "identical": sum(not one.asked for one in found),
        "win_rate": _share(outcomes, draws),
        "wins": int((outcomes > 0.5).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes < 0.5).sum()),
        "position": {
            "changed": _share(changed, draws),
            "shown_first_wins": float(np.mean(for_first)) if for_first else None,
            "verdicts": len(for_first),
        },
        "length": {
            "winner": float(np.mean([a for a, _ in sides])) if sides else None,
            "loser": float(np.mean([b for _, b in sides])) if sides else None,
            "longer_wins": _share(longer, draws),
        },
    }


def ratings(scores: Sequence[float | None], lengths: Sequence[int], draws: Draws) -> dict[str, Any]:
    """The mean of one side's scores (one a prompt), and their rank correlation with the answers' lengths."""
    read = [(score, length) for score, length in zip(scores, lengths, strict=True) if score is not None]
    values = np.array([score for score, _ in read])
    return {
        "prompts": len(read),
        "unparsable": len(scores) - len(read),
        "mean": _mean(values, draws),
        "distribution": {f"{score:g}": int((values == score).sum()) for score in np.unique(values)},
        "length_correlation": spearman(values, np.array([length for _, length in read])) if len(read) > 1 else None,
    }


def difference(first: Sequence[float | None], second: Sequence[float | None], draws: Draws) -> dict[str, Any]:
    """The mean of ``first`` minus ``second`` over the prompts where both were read, the same draw for both."""
    both = [a - b for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return {"prompts": len(both), "difference": _mean(np.array(both), draws)}


def rankings(
    found: Sequence[tuple[Ranking | None, Ranking | None]], lengths: Sequence[Sequence[int]], names: Sequence[str],
    draws: Draws,
) -> dict[str, Any]:  # fmt: skip
    """Mean score and rank of every side, and the first side's win rate by rank against each other one.

    ``found`` holds for each prompt what was read in both orders, in the order of the sides.  ``position.changed`` is
    the share of prompts whose best answer changes with the order; ``contradictions`` the rankings that put an answer
    before one with a higher score.
    """
    whole = [(a, b, size) for (a, b), size in zip(found, lengths, strict=True) if a is not None and b is not None]
    sides = {}
    for side, name in enumerate(names):
        scores = np.array([(a.scores[side] + b.scores[side]) / 2 for a, b, _ in whole])
        ranks = np.array([(a.ranks[side] + b.ranks[side]) / 2 for a, b, _ in whole])
        sides[name] = {"score": _mean(scores, draws), "rank": _mean(ranks, draws)}
    against = {}
    for side, name in enumerate(names[1:], 1):
        pairs = [
            Compared(float(a.ranks[0] < a.ranks[side]), float(b.ranks[0] < b.ranks[side]), (size[0], size[side]))
            for a, b, size in whole
        ]
        won = win_rate(pairs, draws)
        against[name] = {what: won[what] for what in ("win_rate", "wins", "ties", "losses", "length")}
    changed = np.array([float(a.ranks.index(1) != b.ranks.index(1)) for a, b, _ in whole])
    return {
        "prompts": len(whole),
        "incomplete": len(found) - len(whole),
        "unparsable": sum((a is None) + (b is None) for a, b in found),
        "sides": sides,
        "position": {"changed": _share(changed, draws)},
        "contradictions": sum(_contradicts(a) + _contradicts(b) for a, b, _ in whole),
        "win_rates": against,
    }


def _turned(verdict: float | None) -> float | None:
    return None if verdict is None else 1 - verdict


def _contradicts(ranking: Ranking) -> bool:
    by_rank = [score for _, score in sorted(zip(ranking.ranks, ranking.scores, strict=True))]
    return any(after > before for before, after in pairwise(by_rank))


def _share(values: np.ndarray, draws: Draws) -> dict[str, Any] | None:
    return accuracy(values, np.arange(len(values)), draws).as_json() if len(values) else None


def _mean(values: np.ndarray, draws: Draws) -> dict[str, Any] | None:
    return mean(values, np.arange(len(values)), draws).as_json() if len(values) else None
