"""``alignlab evaluate RUN best_of=N``: choosing among N sampled answers by a scorer or by majority, against greedy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.configuration import schema
from alignlab.data.sources import Needs
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError, DataError
from alignlab.measuring.reranking import Pool, table_text, ways
from alignlab.measuring.sampling import Sampler
from alignlab.measuring.scorers import Score, make_scorer, named_scorers
from alignlab.measuring.verification import Answer, Prompt, as_json, prompts_of
from alignlab.registry import FINAL_ANSWERS
from alignlab.request import Request, emit
from alignlab.rewards.intervals import Draws
from alignlab.runfolder import RunFolder
from alignlab.runs.job import make_objective, needs_of
from alignlab.types import Unit
from alignlab.verbs.options import measurement_name, own_options

PROMPTS = 200
RESAMPLES = 2000


@dataclass
class Options:
    """The verb's own settings where answers are re-ranked."""

    best_of: int = 8
    """Answers sampled for each prompt."""
    score: list[str] = field(default_factory=list)
    """Who ranks them: ``SCORER`` or ``NAME=SCORER`` (:mod:`alignlab.measuring.scorers`); several are compared."""
    prompts: int = PROMPTS
    """So many held-out prompts."""
    temperature: float = 1.0
    """Of the sampling; ``eval.top_p`` applies too."""
    measure: str = "correct"
    """The verifier's measure that is the quality of an answer."""
    resamples: int = RESAMPLES
    """Draws of the bootstrap over prompts; ``seed`` is the run's."""


def run(request: Request, config: RootConfig, folder: RunFolder | None) -> int:
    """Print the table; JSON and the run's ``eval/best_of-<rows>-<8 hex>.json`` hold all figures, texts and scores."""
    options = own_options(request, Options)
    _check(options)
    scorers = named_scorers(options.score, config)
    needs = needs_of(make_objective(config)) if config.objective is not None else Needs(Unit.SEQUENCE)
    if needs.stage is not None:
        raise ConfigError("evaluate best_of=: answers under conditions are not re-ranked; see control=true")
    prompts = list(prompts_of(config.data, needs, held_out=True, limit=options.prompts))
    if not prompts:
        raise DataError("evaluate best_of=: the held-out rows have no prompt")
    greedy, sampled = _answered(config, options, prompts)
    measure = make_scorer("verifier", config, options.measure)
    quality, quality_greedy = measure(sampled), measure(greedy)
    scores = {name: scorer(sampled) for name, scorer in scorers.items()}
    pools = [
        Pool(
            quality=_known(quality[number]), scores={name: own[number] for name, own in scores.items()},
            votes=_votes(config, answer), greedy=_known(quality_greedy[number])[0],
        )
        for number, answer in enumerate(sampled)
    ]  # fmt: skip
    judges = {name: scorer.identity for name, scorer in scorers.items()}
    result: dict[str, Any] = {
        "model": config.model.name_or_path, "measure": options.measure, "temperature": options.temperature,
        "scorers": judges, "unscored": {n: sum(s is None for own in all_ for s in own) for n, all_ in scores.items()},
        "resamples": options.resamples, "seed": config.seed, **ways(pools, Draws(options.resamples, config.seed)),
    }  # fmt: skip
    print(f"pools    {len(pools)} prompts x {options.best_of} answers at temperature {options.temperature:g}; "
          f"quality is the verifier's '{options.measure}'")  # fmt: skip
    for name, count in result["unscored"].items():
        if count:
            print(f"unscored {count} answers by {name}: empty or too long, and the last to be chosen")
    print("\n".join(table_text(result)))
    if folder is not None:
        folder.eval.mkdir(exist_ok=True)
        own = {k: v for k, v in vars(options).items() if k != "score"} | {"scorers": judges, "seed": config.seed}
        said = {k: v for k, v in schema.flatten(config).items() if k.startswith("objective.")} | own
        path = folder.eval / f"best_of-{measurement_name(config, 'pools', said)}.json"
        texts = [
            {**texts, "greedy": one.texts[0], "scores": {name: own[number] for name, own in scores.items()}}
            for number, (one, texts) in enumerate(zip(greedy, as_json(sampled), strict=True))
        ]
        write_atomic(path, json.dumps({**result, "answers": texts}, indent=1, ensure_ascii=False) + "\n")
        print(f"written  {path}")
    emit(request, result)
    return 0


def _check(options: Options) -> None:
    problems = [
        f"{key}={getattr(options, key)}: at least {least}"
        for key, least in (("best_of", 2), ("prompts", 1), ("resamples", 100))
        if getattr(options, key) < least
    ]
    if options.temperature <= 0:
        problems.append(f"temperature={options.temperature:g}: answers would all be the same; it must be above 0")
    if problems:
        raise ConfigError("\n".join(f"evaluate: {problem}" for problem in problems))


def _answered(config: RootConfig, options: Options, prompts: list[Prompt]) -> tuple[list[Answer], list[Answer]]:
    """(the greedy answer, the sampled answers) to each prompt; the policy leaves memory with this call."""
    policy = Sampler(config, "evaluate best_of=")
    greedy = policy.answers(prompts, temperature=0.0, num_samples=1)
    return list(greedy), list(
        policy.answers(
            prompts, temperature=options.temperature, num_samples=options.best_of,
            seed=dist.derive_seed(config.seed, "best_of"),
        )
    )  # fmt: skip


def _known(scores: list[Score]) -> list[float]:
    return [score for score in scores if score is not None]  # a verifier takes every text


def _votes(config: RootConfig, answer: Answer) -> list[str | None] | None:
    """What each text says in the end, where someone can read that for this verifier's rows."""
    kind = config.eval.verifier or answer.prompt.verify.get("kind")
    if kind not in FINAL_ANSWERS.names():
        return None
    return [FINAL_ANSWERS.get(kind)(text) for text in answer.texts]
