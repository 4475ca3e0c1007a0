"""Who says how good a generated text is: a verifier's measure, or a reward model.  One place for the loop, the control
meter and re-ranking.

A scorer is named ``verifier`` (the one that each row names), ``<registered verifier>[:measure]`` (any function of the
row and the text, see :func:`alignlab.registry.register_verifier`), or by a reward model: a run, its ``model`` folder,
any other folder or a hub name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from alignlab.config import RootConfig
from alignlab.configuration import names
from alignlab.errors import ConfigError
from alignlab.measuring.scoring import RewardModel, reward_model
from alignlab.measuring.verification import Answer
from alignlab.models.source import check_reward_model
from alignlab.registry import VERIFIERS
from alignlab.types import Message, Sample
from alignlab.types import Sequence as Completion

VERIFIER = "verifier"
"""The scorer that every row brings along."""
_NAMED = re.compile(r"([A-Za-z_][\w.-]*)=(.+)")

Score = float | None
"""None: the scorer could not take the text (empty, too long, spelling a control token)."""


class TextScorer(Protocol):
    """Scores of generated texts; larger is better."""

    identity: str
    """what the scores depend on, contents of local files included"""
    is_verifier: bool
    """whether scores are a verifier's measure, and so may be levels"""

    def __call__(self, answers: Sequence[Answer]) -> list[list[Score]]:
        """The score of every text of every answer."""
        ...


def make_scorer(name: str, config: RootConfig, measure: str = "correct") -> TextScorer:
    """The scorer called ``name``; ``measure`` is what it takes of a verifier's measures where ``name`` says nothing.

    ConfigError, before anything is generated, where no scorer is called so.
    """
    verifier, _, own = name.partition(":")
    if verifier == VERIFIER or verifier in VERIFIERS.names():
        return VerifierScorer(None if verifier == VERIFIER else verifier, own or measure)
    return RewardModelScorer(name, config)


def named_scorers(words: Sequence[str], config: RootConfig) -> dict[str, TextScorer]:
    """Scorers given as ``NAME=SCORER`` or ``SCORER`` (called by the last part of its path), in order."""
    found: dict[str, TextScorer] = {}
    for word in words:
        said = None if Path(word).expanduser().exists() else _NAMED.fullmatch(word)
        name, what = said.groups() if said else (short_name(word), word)
        if name in found:
            raise ConfigError(f"score: two scorers are called '{name}'; name them, score=[NAME={what}, ...]")
        found[name] = make_scorer(what, config)
    return found


def short_name(name: str) -> str:
    """What a run or model folder is called on the screen; the run, where it is a run's ``model/``."""
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


class VerifierScorer:
    """A measure of the verifier called ``name``; without a name, of those that the answers have been given already."""

    is_verifier = True

    def __init__(self, name: str | None, measure: str) -> None:
        self.name, self.measure = name, measure
        self.identity = f"{name or VERIFIER}:{measure}"

    def __call__(self, answers: Sequence[Answer]) -> list[list[Score]]:
        return [[self._of(answer, place) for place in range(len(answer.texts))] for answer in answers]

    def _of(self, answer: Answer, place: int) -> Score:
        if self.name is None:
            measures = answer.measures[place]
        else:
            measures = VERIFIERS.get(self.name)(answer.prompt.verify, answer.texts[place])
        if self.measure not in measures:
            known = ", ".join(measures) or "nothing: name one, eval.verifier=NAME, or a reward model as the scorer"
            raise ConfigError(f"measure={self.measure}: the verifier measures {known}")
        return measures[self.measure]


class RewardModelScorer:
    """The reward model called ``name``.  It is in memory while it scores, and no longer."""

    is_verifier = False

    def __init__(self, name: str, config: RootConfig) -> None:
        path, run = reward_model(name)
        # Its own tokenizer and template: what is said of the policy's says nothing of the judge's.
        model = replace(
            config.model, name_or_path=path, revision=None, tokenizer_name_or_path=None, chat_template=None,
            layout="auto", trust_remote_code=False,
        )  # fmt: skip
        if run is None and not Path(path).expanduser().exists() and "/" not in path:
            known = ", ".join([VERIFIER, *VERIFIERS.names()])
            raise ConfigError(f"scorer '{name}': no such reward model, and no verifier is called so ({known})")
        check_reward_model(model)
        self.identity = names.identify(path)
        self._config = replace(config, model=model)

    def __call__(self, answers: Sequence[Answer]) -> list[list[Score]]:
        return RewardModel(self._config).of([_sample(number, answer) for number, answer in enumerate(answers)])


def _sample(number: int, answer: Answer) -> Sample:
    """An answer as a row: its prompt, and each text as a completion of it."""
    prompt = answer.prompt.messages
    completions = [Completion(prompt=prompt, completion=_said(prompt, text)) for text in answer.texts]
    return Sample(completions, id=f"{number} ({answer.prompt.id})", tools=answer.prompt.tools)


def _said(prompt: list[Message] | str, text: str) -> list[Message] | str:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def means(scores: Sequence[Sequence[Score]]) -> float | None:
    """The mean of all scores there are; None where there is none."""
    found = list(_present(scores))
    return sum(found) / len(found) if found else None


def _present(scores: Sequence[Sequence[Score]]) -> Iterator[float]:
    return (score for own in scores for score in own if score is not None)
