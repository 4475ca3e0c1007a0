"""From a round's sampled answers to rows: the best scored against the worst, or all of them with their ratings.

UltraMedical's iterative preference learning (arXiv 2406.03949, section 5.2) takes the answers that a scorer likes best
and least; Controllable Preference Optimization (arXiv 2402.19085) orders all answers to a prompt under a condition,
which is done where the rows are read (:mod:`alignlab.data.condition`).  Every prompt that gives no row is counted with
its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignlab.errors import ConfigError
from alignlab.types import Message

FORMS = ("pairs", "labels")
"""Rows that an objective takes: ``pairs`` (dpo), ``labels`` (kto)."""


@dataclass(frozen=True)
class Scored:
    """One prompt, its sampled answers, each one's score, and what a verifier measured on each."""

    id: str
    prompt: list[Message] | str
    texts: list[str]
    scores: list[float | None]
    """None: the scorer could not take the text, which then is no candidate"""
    measures: list[dict[str, float]] = field(default_factory=list)
    own: bool = False
    """whether the last text is the row's own answer"""


@dataclass(frozen=True)
class Rated:
    """One prompt, the texts answered to it, what each one's condition asked for, and its rating in every dimension."""

    id: str
    prompt: list[Message] | str
    texts: list[str]
    requested: list[dict[str, float]]
    """empty: no condition"""
    ratings: list[dict[str, float] | None]
    """None: a scorer could not take the text"""
    measures: list[dict[str, float]] = field(default_factory=list)
    own: bool = False
    """whether the last text is the row's own answer"""


@dataclass
class Account:
    """What became of a round's prompts: ``rows`` made, and the prompts that gave none by reason."""

    prompts: int
    kept: int
    dropped: Counter[str]
    mean_score: float | None
    """of all sampled answers that have a score, the rows' own answers left out; None: ratings are no one score"""
    unscored: int = 0
    """answers without a score"""
    own: Counter[str] = field(default_factory=Counter)
    """how the rows' own answers scored: as the ``best``, the ``worst``, ``between``, ``unscored`` (of prompts kept);
    where answers are rated, how many are ``rated``, ``unscored`` or ``off_level`` (of all prompts)"""
    off_level: int = 0
    """rated answers beyond the levels of a dimension"""

    def as_json(self) -> dict[str, Any]:
        shown = {"off_level": self.off_level} if self.mean_score is None else {"mean_score": self.mean_score}
        return {
            "prompts": self.prompts, "kept": self.kept, "dropped": dict(self.dropped), "unscored": self.unscored,
            **shown, **({"own": dict(self.own)} if self.own else {}),
        }  # fmt: skip


def preference_rows(
    answers: Iterable[Scored], *, threshold: float = 0.0, form: str = "pairs"
) -> tuple[list[dict[str, Any]], Account]:
    """(rows, account): of each prompt the best answer against the worst, where they are over ``threshold`` apart.

    Of equal scores the first sampled answer counts.  ``pairs``: prompt, chosen, rejected, score_chosen, score_rejected;
    ``labels``: two rows, prompt, completion, label.  Prompts are dropped as ``tie`` (all scores equal), ``close``
    (not more than the threshold apart) or ``unscored`` (fewer than two answers have a score).
    """
    if form not in FORMS:
        raise ConfigError(f"rows of form '{form}' are not known; known: {', '.join(FORMS)}")
    if threshold < 0:
        raise ConfigError(f"threshold: {threshold} is below 0")
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    own: Counter[str] = Counter()
    prompts = kept = unscored = 0
    sampled: list[float] = []
    for one in answers:
        prompts += 1
        candidates = [score for score in one.scores if score is not None]
        sampled += [score for score in one.scores[: len(one.scores) - one.own] if score is not None]
        unscored += len(one.scores) - len(candidates)
        if len(candidates) < 2:
            dropped["unscored"] += 1
            continue
        best, worst = max(candidates), min(candidates)
        if best - worst <= threshold:
            dropped["tie" if best == worst else "close"] += 1
            continue
        kept += 1
        first, last = (one.scores.index(score) for score in (best, worst))
        if one.own:
            own[_place(one.scores[-1], best, worst)] += 1
        rows += _rows(one, one.texts[first], one.texts[last], best, worst, form)
    return rows, Account(prompts, kept, dropped, sum(sampled) / max(1, len(sampled)), unscored, own)


def _place(score: float | None, best: float, worst: float) -> str:
    if score is None:
        return "unscored"
    return "best" if score == best else "worst" if score == worst else "between"


def _rows(one: Scored, chosen: str, rejected: str, best: float, worst: float, form: str) -> list[dict[str, Any]]:
    turns = turns_of(one.prompt)
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    if form == "pairs":
        scores = {"score_chosen": best, "score_rejected": worst}
        return [{"id": one.id, "prompt": turns, "chosen": good, "rejected": bad, **scores}]
    return [
        {"id": f"{one.id}#{name}", "prompt": turns, "completion": completion, "label": label}
        for name, completion, label in (("best", good, True), ("worst", bad, False))
    ]


def turns_of(prompt: list[Message] | str) -> list[Message]:
    """A prompt as the rows of a round have it: plain text is a user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


# ---------------------------------------------------------------------------------------------------------------
# Ratings
# ---------------------------------------------------------------------------------------------------------------


def rated_rows(answers: Iterable[Rated], levels: Mapping[str, Sequence[float]]) -> tuple[list[dict[str, Any]], Account]:
    """(rows, account): each prompt with all its answers and their ratings, as *scored completions*.

    An answer that is ``unscored``, or rated beyond a dimension's ``levels`` (``off_level``: it could neither be asked
    for nor be read as a rating), is left out.  Prompts are dropped as ``unscored`` (fewer than two answers have
    ratings), ``off_level`` (fewer than two of these are on the levels) or ``tie`` (all ratings equal, so that no
    condition tells the answers apart).
    """
    rows: list[dict[str, Any]] = []
    account = Account(0, 0, Counter(), None)
    for one in answers:
        account.prompts += 1
        fates = [_fate(ratings, levels) for ratings in one.ratings]
        counts = Counter(fates)
        account.unscored += counts["unscored"]
        account.off_level += counts["off_level"]
        if one.own:
            account.own[fates[-1]] += 1
        kept = [
            {"response": text, "ratings": ratings}
            for text, ratings, fate in zip(one.texts, one.ratings, fates, strict=True)
            if fate == "rated"
        ]
        if len(fates) - counts["unscored"] < 2:
            account.dropped["unscored"] += 1
        elif len(kept) < 2:
            account.dropped["off_level"] += 1
        elif all(completion["ratings"] == kept[0]["ratings"] for completion in kept):
            account.dropped["tie"] += 1
        else:
            account.kept += 1
            rows.append({"id": one.id, "prompt": turns_of(one.prompt), "completions": kept})
    return rows, account


def _fate(ratings: Mapping[str, float] | None, levels: Mapping[str, Sequence[float]]) -> str:
    if ratings is None:
        return "unscored"
    within = all(min(own) <= ratings[name] <= max(own) for name, own in levels.items() if name in ratings)
    return "rated" if within else "off_level"
