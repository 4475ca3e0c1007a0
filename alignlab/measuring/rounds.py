"""From a round's sampled and scored answers to preference rows: best against worst, ties and near-ties left out.

UltraMedical's iterative preference learning (arXiv 2406.03949, section 5.2) takes the answers that a scorer likes best
and least; here every prompt that gives no row is counted with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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


@dataclass
class Account:
    """What became of a round's prompts: ``rows`` made, and the prompts that gave none by reason."""

    prompts: int
    kept: int
    dropped: Counter[str]
    mean_score: float
    """of all sampled answers that have a score, the rows' own answers left out"""
    unscored: int = 0
    """answers without a score"""
    own: Counter[str] = field(default_factory=Counter)
    """how the rows' own answers scored: as the ``best``, the ``worst``, ``between``, ``unscored`` (of prompts kept)"""

    def as_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts, "kept": self.kept, "dropped": dict(self.dropped), "mean_score": self.mean_score,
            "unscored": self.unscored, **({"own": dict(self.own)} if self.own else {}),
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
    turns = [{"role": "user", "content": one.prompt}] if isinstance(one.prompt, str) else one.prompt
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    if form == "pairs":
        scores = {"score_chosen": best, "score_rejected": worst}
        return [{"id": one.id, "prompt": turns, "chosen": good, "rejected": bad, **scores}]
    return [
        {"id": f"{one.id}#{name}", "prompt": turns, "completion": completion, "label": label}
        for name, completion, label in (("best", good, True), ("worst", bad, False))
    ]
