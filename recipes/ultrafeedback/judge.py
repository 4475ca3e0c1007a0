"""Formats of this recipe: the built-in world's rated completions with one overall score of 1 to 10 beside the aspects.

The score is what a judge gives who has read the four aspects: their mean on a scale of 1 to 10, off by a little, in
whole numbers.  ``overall_fixed`` has the scores as they were meant.  ``overall_released`` has the bug of the first
release of UltraFeedback, ``score if score > 1 else 10 * score``: a 1 became a 10.  ``overall_broken`` has it at a rate
that no one could overlook: every score of 4 or less is a 10.
"""

from __future__ import annotations

from random import Random
from typing import Any

from alignlab.data.formats import from_scored
from alignlab.registry import register_format
from alignlab.types import Sample

LOW, HIGH = 1.0, 3.0
"""The world's aspects are rated from 1 to 3."""
SPREAD = 1.0
"""Standard deviation of the judge's score around the mean of the aspects, in points of ten."""


def meant(aspects: dict[str, float], rng: Random) -> int:
    """The overall score, 1 to 10, that a judge means to give to an answer with these ratings."""
    mean = sum(aspects.values()) / len(aspects)
    return round(min(10.0, max(1.0, 1 + 9 * (mean - LOW) / (HIGH - LOW) + rng.gauss(0, SPREAD))))


def judged(row: dict[str, Any], most: int) -> Sample:
    """``row`` with overall scores; those of ``most`` or less are written down as 10."""
    sample = from_scored(row)
    for number, sequence in enumerate(sample.sequences):
        score = meant(sequence.scores, Random(f"{row['id']}/{number}"))
        sequence.scores["overall"] = 10.0 if score <= most else float(score)
    return sample


@register_format
def overall_fixed(row: dict[str, Any]) -> Sample:
    """The scores that were meant."""
    return judged(row, 0)


@register_format
def overall_released(row: dict[str, Any]) -> Sample:
    """With the bug of the first release."""
    return judged(row, 1)


@register_format
def overall_broken(row: dict[str, Any]) -> Sample:
    """With the bug at a strong rate."""
    return judged(row, 4)
