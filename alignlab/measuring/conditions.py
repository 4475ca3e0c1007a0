"""Asking under conditions: which levels there are to ask for, a prompt under a condition, conditions dealt out evenly,
and what further scorers say of the answers.  One place for the control meter and the loop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.data.condition import Conditioner
from alignlab.data.condition_format import Condition
from alignlab.data.plan import permutation
from alignlab.data.sources import Needs, samples_of
from alignlab.errors import ConfigError
from alignlab.measuring.control import grid
from alignlab.measuring.scorers import TextScorer
from alignlab.measuring.verification import Answer, Prompt

MOST_LEVELS = 10
"""Ratings of one dimension that are taken as levels when none are declared; more look like a continuous score."""


def levels_of(config: RootConfig, needs: Needs, verb: str) -> dict[str, list[float]]:
    """The levels of every controlled dimension, in rising order.

    Controlled is what ``data.condition.buckets`` name, else ``data.condition.dimensions``, else all that the held-out
    rows are rated in.  Levels are those declared, else the ratings that the held-out rows have.
    """
    declared, wanted = config.data.condition.levels, _controlled(config)
    found: dict[str, set[float]] = defaultdict(set)
    for _, sample in samples_of(config.data, needs, held_out=True):
        for sequence in sample.sequences:
            for dimension, rating in sequence.scores.items():
                found[dimension].add(rating)
    chosen = wanted or [*config.data.condition.dimensions] or sorted(set(found) - {"overall"})
    levels = {d: sorted(declared[d] if d in declared else found.get(d, ())) for d in chosen}
    for dimension, own in levels.items():
        if len(own) < 2:
            raise ConfigError(
                f"{verb}: '{dimension}' has {len(own)} level(s) in the held-out rows; declare them: "
                f"data.condition.levels={{{dimension}: [1, 2, 3]}}"
            )
        if len(own) > MOST_LEVELS:
            raise ConfigError(
                f"{verb}: '{dimension}' has {len(own)} different ratings; declare the levels to ask "
                f"for: data.condition.levels={{{dimension}: [1, 2, 3, 4, 5]}}"
            )
    if not levels:
        raise ConfigError(f"{verb}: the held-out rows have no ratings to ask for; say data.condition.dimensions and "
                          "data.condition.levels")  # fmt: skip
    return levels


def _controlled(config: RootConfig) -> list[str]:
    """The dimensions that the buckets name: what the model was taught to follow."""
    return list(dict.fromkeys(d for bucket in config.data.condition.buckets for d in bucket.get("condition", {})))


def levels_text(levels: Mapping[str, Sequence[float]]) -> str:
    """``steps [1, 2, 3] x phrasing [1, 2, 3] = 9 conditions``."""
    each = [f"{dimension} [{', '.join(f'{level:g}' for level in own)}]" for dimension, own in levels.items()]
    return f"{' x '.join(each)} = {len(grid(levels))} conditions"


def under(conditioner: Conditioner, prompt: Prompt, condition: Mapping[str, float]) -> Prompt:
    """``prompt`` under a condition, written as in training; its id stays, so that answers can be brought together."""
    condition = dict(condition)
    return replace(prompt, messages=conditioner.prompt(condition, prompt.messages), requested=condition)


def spread(levels: Mapping[str, Sequence[float]], count: int, seed: int) -> list[Condition]:
    """``count`` conditions of the grid in a random order, each dimension's levels equally often (to within one).

    As many whole grids as fit; of the rest every dimension's levels are dealt out evenly and put together at random
    (a Latin hypercube sample: McKay, Beckman and Conover 1979).
    """
    cells = grid(levels)
    whole, rest = divmod(count, len(cells))
    columns = [_evenly(own, rest, dist.derive_seed(seed, name)) for name, own in levels.items()]
    found = cells * whole + [dict(zip(levels, chosen, strict=True)) for chosen in zip(*columns, strict=True)]
    return [found[place] for place in permutation(count, seed, 0)]


def _evenly(own: Sequence[float], count: int, seed: int) -> list[float]:
    """``count`` levels in a random order; of those that there is no whole round for, which ones is random too."""
    whole, rest = divmod(count, len(own))
    dealt = [*own] * whole + [own[place] for place in permutation(len(own), seed, 0)[:rest]]
    return [dealt[place] for place in permutation(count, seed, 1)]


def scored_by(found: Sequence[Answer], plain: Sequence[Prompt], scorers: Mapping[str, TextScorer]) -> list[Answer]:
    """``found`` with the scorers' scores as further measures; a text that a scorer cannot take gets none of it.

    ``plain`` are the prompts without their conditions, which is how a scorer sees them.  ConfigError where the
    verifier has a measure of a scorer's name.
    """
    answers = list(found)
    for name, scorer in scorers.items():
        if any(name in measures for answer in answers for measures in answer.measures):
            raise ConfigError(f"score: '{name}' is what the verifier measures already; call it otherwise")
        scores = scorer([replace(answer, prompt=prompt) for answer, prompt in zip(answers, plain, strict=True)])
        answers = [
            replace(answer, measures=[
                measures if score is None else {**measures, name: score}
                for measures, score in zip(answer.measures, own, strict=True)
            ])
            for answer, own in zip(answers, scores, strict=True)
        ]  # fmt: skip
    return answers
