"""How a round of the loop asks and scores: for preferences by one score (dpo, kto), for ratings under conditions (cpo).

:mod:`alignlab.measuring.rounds` makes rows of the answers.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignlab import dist
from alignlab.config import DataConfig, RootConfig
from alignlab.configuration import schema
from alignlab.data.condition import Conditioner
from alignlab.data.plan import permutation
from alignlab.data.sources import Needs
from alignlab.errors import ConfigError, DataError
from alignlab.measuring.conditions import levels_of, levels_text, scored_by, spread, under
from alignlab.measuring.rounds import Account, Rated, Scored, preference_rows, rated_rows, turns_of
from alignlab.measuring.sampling import Sampler
from alignlab.measuring.scorers import VERIFIER, make_scorer, means, named_scorers
from alignlab.measuring.verification import Answer, Prompt, measures_of, prompts_of, summary
from alignlab.types import Unit

GENERATION = ("backend", "max_new_tokens", "verifier", "top_p", "batch_size")
"""Keys of ``eval`` that say how answers are generated and measured."""


@dataclass
class RoundOptions:
    """What a round asks and how answers are scored."""

    prompts: int = 256
    """Training prompts of a round; the next round takes the next ones, from the start again when all are used."""
    samples: int = 8
    """Answers to each prompt."""
    temperature: float = 1.0
    scorer: str = VERIFIER
    """Who scores the answers: verifier, or a reward model (a run, a folder, a hub name)."""
    measure: str = "correct"
    """The verifier's measure that is the score where a verifier scores; with a reward model it is shown beside."""
    score: list[str] = field(default_factory=list)
    """cpo: ratings besides the verifier's measures: ``NAME=SCORER`` (:mod:`alignlab.measuring.scorers`)."""
    own_answer: bool = False
    """The row's own answer is scored too, and may be a prompt's best or worst one."""
    threshold: float = 0.0
    """Best and worst answer must be more than this apart."""
    held_out: int = 200
    """Held-out prompts that are answered (greedy) after each round."""


@dataclass(frozen=True)
class Made:
    """What a round's answers became: lines of ``samples.jsonl`` and ``rows.jsonl``, and the account of both."""

    samples: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    account: Account
    measures: dict[str, float]
    """means over the sampled answers, the rows' own left out"""


class Asking(ABC):
    """What a round does with a policy, but for its training."""

    form: str
    """what its rows are: ``pairs``, ``labels``, ``ratings``"""
    judges: str
    """who scores, for reading"""
    scored_apart: bool = False
    """whether the score is another one's opinion, so that the verifier's measures are shown beside"""

    def __init__(self, config: RootConfig, options: RoundOptions, needs: Needs) -> None:
        self.config, self.options = config, options
        self._plain = replace(needs, stage=None)  # prompts as they are without a condition

    @abstractmethod
    def sampled(self, policy: str, number: int) -> Made:
        """Sample answers to the prompts of round ``number``, score them, and write them as rows."""

    @abstractmethod
    def measured(self, policy: str, number: int) -> dict[str, Any]:
        """``prompts`` and the figures of greedy answers to held-out prompts."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What scores depend on besides the answers."""

    def inputs(self) -> dict[str, Any]:
        """What a round's rows depend on besides the policy."""
        known = ("prompts", "samples", "temperature", "measure", "own_answer", "threshold")
        said = {name: getattr(self.options, name) for name in known} | self.identity()
        rows = {k: v for k, v in schema.flatten(self.config).items() if k.startswith("data.")}
        return {**said, "form": self.form, "seed": self.config.seed, **self.generation(), **rows}

    def generation(self) -> dict[str, Any]:
        """How answers are generated."""
        return {f"eval.{name}": getattr(self.config.eval, name) for name in GENERATION}

    def data(self, data: DataConfig) -> DataConfig:
        """``data`` as the training of a round reads it."""
        return data

    def _of_round(self, number: int) -> list[Prompt]:
        """The prompts of a round: the next ones in one order of all training prompts."""
        prompts = list(prompts_of(self.config.data, self._plain, held_out=False))
        if not prompts:
            raise DataError("loop: the rows have no prompt to answer")
        order = permutation(len(prompts), self.config.seed, 0)
        first = (number - 1) * self.options.prompts
        chosen = range(first, first + min(self.options.prompts, len(prompts)))
        return [_in_turns(prompts[order[place % len(prompts)]]) for place in chosen]

    def _held_out(self) -> list[Prompt]:
        prompts = list(prompts_of(self.config.data, self._plain, held_out=True, limit=self.options.held_out))
        if not prompts:
            raise DataError(
                "loop: no held-out row has a prompt to answer; give data.eval_path or a larger eval_fraction"
            )
        return [_in_turns(prompt) for prompt in prompts]

    def _answered(
        self, policy: str, prompts: list[Prompt], number: int, *, samples: int = 1, temperature: float = 0.0
    ) -> list[Answer]:
        model = replace(self.config.model, name_or_path=policy, revision=None)
        sampler = Sampler(replace(self.config, model=model), "loop")
        seed = dist.derive_seed(self.config.seed, "loop", number)
        found = list(sampler.answers(prompts, temperature=temperature, num_samples=samples, seed=seed))
        del sampler  # the training that follows wants the device's memory
        gc.collect()
        return found

    def _own(self, prompt: Prompt) -> Answer | None:
        """The row's own answer, measured; None where it has none, or none is wanted."""
        if prompt.answer is None or not self.options.own_answer:
            return None
        return Answer(prompt, [prompt.answer], [measures_of(prompt, prompt.answer, self.config.eval.verifier)])


class Preferences(Asking):
    """One score: the best of a prompt's answers against the worst."""

    def __init__(self, config: RootConfig, options: RoundOptions, needs: Needs) -> None:
        super().__init__(config, options, needs)
        self.scorer = make_scorer(options.scorer, config, options.measure)
        self.form = "labels" if needs.example is Unit.SEQUENCE else "pairs"
        self.judges = f"'{options.measure}'" if self.scorer.is_verifier else options.scorer
        self.scored_apart = not self.scorer.is_verifier

    def identity(self) -> dict[str, Any]:
        return {"scorer": self.scorer.identity}

    def sampled(self, policy: str, number: int) -> Made:
        options = self.options
        found = self._answered(
            policy, self._of_round(number), number, samples=options.samples, temperature=options.temperature
        )
        every = [self._with_own(answer) for answer in found]
        scored = [
            Scored(a.prompt.id, a.prompt.messages, a.texts, scores, a.measures, len(a.texts) > options.samples)
            for a, scores in zip(every, self.scorer(every), strict=True)
        ]
        rows, account = preference_rows(scored, threshold=options.threshold, form=self.form)
        return Made([vars(one) for one in scored], rows, account, summary(found))

    def _with_own(self, answer: Answer) -> Answer:
        own = self._own(answer.prompt)
        if own is None:
            return answer
        return replace(answer, texts=answer.texts + own.texts, measures=answer.measures + own.measures)

    def measured(self, policy: str, number: int) -> dict[str, Any]:
        found = self._answered(policy, self._held_out(), number)
        mean = means(self.scorer(found))  # a verifier that does not take the measure says so
        return {"prompts": len(found), **summary(found), **({"score": mean} if self.scored_apart else {})}


class Ratings(Asking):
    """Controllable Preference Optimization: answers under conditions, each rated in every dimension.

    A prompt's answers are asked for under conditions that are spread over the grid, so that answers of every level are
    there; which condition a row trains under, and what is preferred then, is said where rows are read
    (:class:`alignlab.data.condition.Conditioner`), of the ratings that were achieved.
    """

    form = "ratings"

    def __init__(self, config: RootConfig, options: RoundOptions, needs: Needs) -> None:
        super().__init__(config, options, needs)
        self.conditioner = Conditioner(config.data.condition, "cpo")
        self.levels = levels_of(config, needs, "loop")
        self.scorers = named_scorers(options.score, config)
        if rewards := [name for name in self.levels if name in self.scorers and not self.scorers[name].is_verifier]:
            raise ConfigError(
                f"loop: '{rewards[0]}' is asked for by levels, and a reward is no level; rate it by a verifier "
                f"(score=[{rewards[0]}=VERIFIER:MEASURE]), or let conditions leave it free (data.condition.buckets)"
            )
        others = [f"{name} by {word.split('=', 1)[-1]}" for name, word in zip(self.scorers, options.score, strict=True)]
        self.judges = f"{', '.join(['the verifier', *others])}; asked for: {levels_text(self.levels)}"

    def identity(self) -> dict[str, Any]:
        return {"levels": self.levels, "score": {name: one.identity for name, one in self.scorers.items()}}

    def data(self, data: DataConfig) -> DataConfig:
        """With the grid's levels declared: a rating between two of them counts as the nearest, as it was asked for."""
        return replace(data, condition=replace(data.condition, levels=self._ladders()))

    def sampled(self, policy: str, number: int) -> Made:
        options, config = self.options, self.config
        prompts = self._of_round(number)
        seed = dist.derive_seed(config.seed, "loop", number, "conditions")
        plain = [prompt for prompt in prompts for _ in range(options.samples)]
        asked = [
            under(self.conditioner, prompt, condition)
            for prompt in prompts
            for condition in spread(self.levels, options.samples, dist.derive_seed(seed, prompt.id))
        ]
        own = [self._own(prompt) for prompt in prompts]
        brought = [answer for answer in own if answer is not None]
        answered = self._answered(policy, asked, number, temperature=options.temperature)
        every = scored_by([*answered, *brought], [*plain, *(answer.prompt for answer in brought)], self.scorers)
        found, rest = every[: len(plain)], iter(every[len(plain) :])
        dimensions = self._dimensions(found)
        rated = []
        for place, prompt in enumerate(prompts):
            answers = found[place * options.samples : (place + 1) * options.samples]
            answers += [next(rest)] if own[place] is not None else []
            rated.append(_rated(prompt, answers, dimensions, own=own[place] is not None))
        rows, account = rated_rows(rated, self._ladders())
        return Made([vars(one) for one in rated], rows, account, self._figures(found))

    def measured(self, policy: str, number: int) -> dict[str, Any]:
        """Every prompt under one condition of the grid; the conditions are the same after every round."""
        prompts = self._held_out()
        dealt = spread(self.levels, len(prompts), dist.derive_seed(self.config.seed, "held out conditions"))
        asked = [under(self.conditioner, prompt, one) for prompt, one in zip(prompts, dealt, strict=True)]
        found = scored_by(self._answered(policy, asked, number), prompts, self.scorers)
        self._dimensions(found)  # what nothing measures is said before the first round
        return {"prompts": len(found), **self._figures(found)}

    def _dimensions(self, found: Sequence[Answer]) -> list[str]:
        """What answers are rated in: ``data.condition.dimensions``, else all that is measured."""
        condition = self.config.data.condition
        measured = sorted({name for answer in found for measures in answer.measures for name in measures})
        dimensions = condition.dimensions or measured
        needed = {**dict.fromkeys(condition.weights, "has a weight"), **dict.fromkeys(dimensions, "is to be rated"),
                  **dict.fromkeys(self.levels, "is asked for")}  # fmt: skip
        for name, why in needed.items():
            if name not in measured or name not in dimensions:
                raise ConfigError(
                    f"loop: '{name}' {why}, and is not among the ratings; measured is "
                    f"{', '.join(measured) or 'nothing'}: say what is asked for (data.condition.buckets or "
                    "dimensions), or who measures it (eval.verifier=NAME, score=[NAME=SCORER])"
                )
        return dimensions

    def _ladders(self) -> dict[str, list[float]]:
        """The levels of every dimension that has some: the grid's, and those declared for dimensions left free."""
        return {**self.config.data.condition.levels, **self.levels}

    def _figures(self, found: Sequence[Answer]) -> dict[str, float]:
        """Means of all measures, requested against achieved, and ``control`` as the control meter has it."""
        figures = summary(list(found))
        followed = [figures.get(f"control/{name}/correlation", 0.0) for name in self.levels]
        return {**figures, "control": sum(followed) / len(followed)}


def _in_turns(prompt: Prompt) -> Prompt:
    """Plain text as the turn that it is in a round's rows, so that the policy is asked as it is trained."""
    return replace(prompt, messages=turns_of(prompt.messages))


def _rated(prompt: Prompt, answers: Sequence[Answer], dimensions: Sequence[str], *, own: bool) -> Rated:
    """The answers to one prompt, one text each; ratings are the measures named like the dimensions."""
    measures = [answer.measures[0] for answer in answers]
    return Rated(
        prompt.id, prompt.messages, [answer.texts[0] for answer in answers],
        [dict(answer.prompt.requested) for answer in answers],
        [{d: found[d] for d in dimensions} if all(d in found for d in dimensions) else None for found in measures],
        measures, own,
    )  # fmt: skip
