"""A deliberately wrong way to read rated rows: the recipe's bands must notice it."""

from typing import Any

from alignlab.data.formats import from_scored
from alignlab.registry import register_format
from alignlab.types import Sample

CONTROLLED = ("steps", "phrasing")


@register_format
def shuffled_conditions(row: dict[str, Any]) -> Sample:
    """``scored`` rows in which every answer carries the style of the next one: conditions say nothing of the text.

    What is free stays where it belongs.
    """
    sample = from_scored(row)
    ratings = [sequence.scores for sequence in sample.sequences]
    for sequence, other in zip(sample.sequences, ratings[1:] + ratings[:1], strict=True):
        sequence.scores = {**sequence.scores, **{name: other[name] for name in CONTROLLED}}
    return sample
