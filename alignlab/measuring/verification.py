"""What generated answers are worth: held-out prompts, greedy completions, and a verifier's measures of them.

Used before and after a training run (``eval.generate``), by ``evaluate`` and by ``sample``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignlab.config import DataConfig, EvalConfig
from alignlab.data.condition import Conditioner
from alignlab.data.examples import same_prompt, to_examples
from alignlab.data.sources import Needs, samples_of
from alignlab.data.template import Encoder
from alignlab.errors import DataError
from alignlab.measuring.control import spearman
from alignlab.registry import VERIFIERS
from alignlab.train.generate import generate
from alignlab.types import Message, Sample, Unit


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer, with what its verifier needs, the levels its condition asks for, and the row's answer."""

    id: str
    messages: list[Message] | str
    tools: list[Any] | None = None
    verify: dict[str, Any] = field(default_factory=dict)
    requested: dict[str, float] = field(default_factory=dict)
    answer: str | None = None
    """what the row itself answers: its demonstration, the chosen or the best rated completion; None: nothing"""


@dataclass(frozen=True)
class Answer:
    """A prompt, the texts generated for it and each text's measures."""

    prompt: Prompt
    texts: list[str]
    measures: list[dict[str, float]]


def prompts_of(data: DataConfig, needs: Needs, *, held_out: bool, limit: int | None = None) -> Iterator[Prompt]:
    """Distinct prompts of the (held-out) rows in file order, under their conditions where the stage has some.

    ``data.eval_fraction`` parts the rows as it does for training.
    """
    conditioner = Conditioner(data.condition, needs.stage) if needs.stage else None
    seen: set[str] = set()
    for _, sample in samples_of(data, needs, held_out=held_out):
        for one in conditioner.rows(sample) if conditioner else [sample]:
            prompt = prompt_of(one, data.rating)
            key = str(prompt.messages)
            if key in seen:
                continue
            seen.add(key)
            yield prompt
            if limit is not None and len(seen) >= limit:
                return


def prompt_of(sample: Sample, by: Sequence[str] = ()) -> Prompt:
    """The prompt of a row's first sequence, and the row's own answer to it; ``by``: the ratings that say which is best.

    Raises :class:`DataError` where there is none.
    """
    first = sample.sequences[0]
    if first.input_ids is not None:
        raise DataError(f"row {sample.id} is tokenised already; generation needs the prompt's text")
    messages = first.prompt
    if not messages and isinstance(first.completion, list):
        messages = first.completion[: _first_answer(first.completion)]
    if not messages:
        raise DataError(f"row {sample.id} has no prompt to answer")
    condition = sample.verify.get("condition", {})
    return Prompt(sample.id, messages, sample.tools, sample.verify, condition, _own_answer(sample, by))


def _own_answer(sample: Sample, by: Sequence[str]) -> str | None:
    """The first assistant turn of the best completion of the row's (first) prompt; None where it says nothing."""
    best = to_examples(sample, Unit.SEQUENCE, by=by).sequences
    said = next((one.completion for one in best if same_prompt(one, sample.sequences[0])), None)
    if isinstance(said, list):
        turn = next((turn for turn in said if turn["role"] == "assistant"), {})
        said = turn.get("content") if not turn.get("tool_calls") else None
    return said if isinstance(said, str) and said.strip() else None


def _first_answer(messages: list[Message]) -> int:
    return next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))


def answers(
    model: Any, tokenizer: Any, encoder: Encoder, prompts: list[Prompt], *, batch_size: int, max_new_tokens: int,
    verifier: str | None = None, temperature: float = 0.0, top_p: float = 1.0, num_samples: int = 1, seed: int = 0,
) -> Iterator[Answer]:  # fmt: skip
    """Generate for every prompt and measure each text with the verifier its row (or ``verifier``) names."""
    ids = (encoder.render_prompt(p.messages, p.tools) for p in prompts)
    made = generate(
        model, tokenizer, ids, stop_ids=encoder.stop_ids, batch_size=batch_size, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, num_samples=num_samples, seed=seed,
    )  # fmt: skip
    yield from measured(prompts, made, verifier)


def measured(prompts: list[Prompt], made: Iterable[list[str]], verifier: str | None = None) -> Iterator[Answer]:
    """The texts made for each prompt, measured by the verifier that its row (or ``verifier``) names."""
    for prompt, texts in zip(prompts, made, strict=True):
        yield Answer(prompt, texts, [measures_of(prompt, text, verifier) for text in texts])


def measures_of(prompt: Prompt, text: str, verifier: str | None = None) -> dict[str, float]:
    """What the verifier that ``prompt``'s row (or ``verifier``) names says of a text; nothing where none is named."""
    name = verifier or prompt.verify.get("kind")
    return VERIFIERS.get(name)(prompt.verify, text) if name else {}


def summary(found: list[Answer]) -> dict[str, float]:
    """Means of all measures, and for conditioned prompts how the achieved levels follow the requested ones.

    ``control/<dimension>/match`` is the share of answers at exactly the requested level; ``.../correlation`` the
    Spearman rank correlation of requested and achieved levels (left out where either never varies).
    """
    totals: dict[str, list[float]] = defaultdict(list)
    asked: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for answer in found:
        for measured in answer.measures:
            for name, value in measured.items():
                totals[name].append(value)
            for dimension, level in answer.prompt.requested.items():
                if dimension in measured:
                    asked[dimension].append((level, measured[dimension]))
    out = {name: sum(values) / len(values) for name, values in sorted(totals.items())}
    for dimension, levels in sorted(asked.items()):
        out[f"control/{dimension}/match"] = sum(a == b for a, b in levels) / len(levels)
        correlation = spearman(*np.array(levels).T)
        if correlation is not None:
            out[f"control/{dimension}/correlation"] = correlation
    if asked:
        every = [pair for levels in asked.values() for pair in levels]
        out["control/match"] = sum(a == b for a, b in every) / len(every)
    return out


def verified(
    model: Any, tokenizer: Any, encoder: Encoder, data: DataConfig, needs: Needs, config: EvalConfig
) -> tuple[dict[str, float], list[Answer]]:
    """Greedy answers to ``config.generate`` held-out prompts: (summary, answers)."""
    prompts = list(prompts_of(data, needs, held_out=True, limit=config.generate))
    found = list(
        answers(
            model,
            tokenizer,
            encoder,
            prompts,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            verifier=config.verifier,
        )
    )
    return summary(found), found


def as_json(found: list[Answer]) -> list[Mapping[str, Any]]:
    """Answers as plain objects for a JSON file."""
    return [
        {
            "id": a.prompt.id, "prompt": a.prompt.messages, "requested": a.prompt.requested, "texts": a.texts,
            "measures": a.measures,
        }
        for a in found
    ]  # fmt: skip
