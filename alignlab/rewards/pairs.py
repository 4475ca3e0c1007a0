"""Figures of pairs: accuracy by category, length, the sign of absolute rewards, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alignlab.rewards.intervals import Draws, accuracy, mean, wilson
from alignlab.rewards.judged import Judged

BINS = 10


def outcomes(differences: np.ndarray, tie: float = 0.5) -> np.ndarray:
    """float64 [P]: 1 where a difference is positive, 0 where it is negative, ``tie`` where it is 0.

    A half for a tie makes a model that says the same of everything as good as chance.
    """
    return np.where(differences == 0, tie, (differences > 0).astype(np.float64))


def figures(judged: Judged, draws: Draws) -> dict[str, Any]:
    """How often the chosen answer has the higher reward, beside how often it is the longer one, and the difference.

    ``over_longer`` has a paired interval: prompts are drawn, and the model and the rule are measured on the same draw.
    """
    margins = judged.margins
    right, longer = outcomes(margins), outcomes(judged.length_differences)
    return {
        "pairs": len(margins),
        "prompts": len(np.unique(judged.prompts)),
        "ties": int((margins == 0).sum()),
        "accuracy": accuracy(right, judged.prompts, draws).as_json(),
        "longer_is_better": accuracy(longer, judged.prompts, draws).as_json(),
        "over_longer": mean(right - longer, judged.prompts, draws).as_json(),
        "margin": float(margins.mean()),
    }


def by_category(judged: Judged, draws: Draws) -> dict[str, dict[str, Any]]:
    """:func:`figures` of each category, in the order of their names."""
    return {
        str(name): figures(judged.only(judged.categories == name), draws)
        for name in np.unique(judged.categories).tolist()
    }


def length_slope(judged: Judged) -> dict[str, float] | None:
    """Least squares of the reward's difference on the length's: ``{slope, standard_error, t, intercept}``.

    The slope is in reward per token.  The standard error lets residuals of one prompt depend on each other (Liang and
    Zeger 1986, with the factor G/(G-1) (n-1)/(n-2)).  None where all differences of length are equal.
    """
    x, y = judged.length_differences.astype(np.float64), judged.margins
    _, places = np.unique(judged.prompts, return_inverse=True)
    groups, count = int(places.max()) + 1 if len(places) else 0, len(x)
    if groups < 3 or np.ptp(x) == 0:
        return None
    design = np.stack((np.ones(count), x), axis=1)
    inverse = np.linalg.inv(design.T @ design)
    intercept, slope = inverse @ design.T @ y
    residuals = y - intercept - slope * x
    scores = np.stack([np.bincount(places, weights=column * residuals) for column in design.T], axis=1)
    factor = groups / (groups - 1) * (count - 1) / (count - 2)
    error = float(np.sqrt(factor * (inverse @ (scores.T @ scores) @ inverse)[1, 1]))
    t = float(slope) / error if error else None
    return {"slope": float(slope), "standard_error": error, "intercept": float(intercept)} | ({"t": t} if t else {})


def signs(judged: Judged, draws: Draws) -> dict[str, Any]:
    """Whether zero means something (Eurus' absolute terms, arXiv 2404.02078): chosen above it, rejected below."""
    chosen, rejected = judged.rewards[judged.pairs].T
    right = (chosen > 0) & (rejected < 0)
    return {
        "chosen_positive": accuracy((chosen > 0).astype(np.float64), judged.prompts, draws).as_json(),
        "rejected_negative": accuracy((rejected < 0).astype(np.float64), judged.prompts, draws).as_json(),
        "both": accuracy(right.astype(np.float64), judged.prompts, draws).as_json(),
        "mean_chosen": float(chosen.mean()),
        "mean_rejected": float(rejected.mean()),
    }


@dataclass(frozen=True)
class Bin:
    """Pairs of about equal confidence: their mean confidence, how often they are right, the interval of that."""

    pairs: int
    confidence: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """``error``: the expected calibration error; ``log_loss``: the mean of -log sigmoid(margin)."""

    error: float
    log_loss: float
    bins: list[Bin]


def calibration(margins: np.ndarray, bins: int = BINS) -> Calibration:
    """How far the probability sigmoid(margin) that Bradley and Terry's model gives is from how often it is right.

    The order of a pair is nobody's secret here (the chosen one stands first), so confidence is that in the answer the
    model prefers, sigmoid(abs(margin)) in [0.5, 1]; a tie is right by half.  The error is
    sum_b n_b / P |accuracy_b - confidence_b| over bins of equal width (Naeini et al. 2015; Guo et al. 2017).
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), outcomes(margins)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found, error = [], 0.0
    for number in range(bins):
        own = place == number
        if count := int(own.sum()):
            hits, sure = float(right[own].mean()), float(confidence[own].mean())
            found.append(Bin(count, sure, hits, *wilson(hits * count, count)))
            error += count / len(margins) * abs(hits - sure)
    return Calibration(float(error), float(np.logaddexp(0, -margins).mean()), found)
