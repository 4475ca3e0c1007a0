"""The two or more sides that a judge compares: what each of them answered to the same prompts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab.config import DataConfig, ModelConfig, RootConfig
from alignlab.configuration import names
from alignlab.data import cache
from alignlab.data.examples import to_examples
from alignlab.data.sources import Needs, holds_out, samples_of, sources_of
from alignlab.errors import ConfigError, DataError
from alignlab.judges.templates import request_text
from alignlab.measuring.sampling import sampled
from alignlab.measuring.verification import Prompt, prompt_of
from alignlab.models.source import model_folder
from alignlab.runfolder import finished_model
from alignlab.types import Sample, Unit

ROWS = "rows"
"""The side that is the rows' own answers."""
KIND = "answers"
"""The cache's name for generated answers."""


@dataclass(frozen=True)
class Side:
    """One side: its answers by the text of the prompt (:func:`request_text`), in order."""

    name: str
    answers: dict[str, str]
    prompts: list[Prompt] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """rows that hold no answer (``no_answer``), or whose prompt stood before (``repeated_prompt``)"""


def is_file(name: str) -> bool:
    """Whether a side is a file of answers."""
    return Path(name).expanduser().is_file()


def from_file(name: str, data: DataConfig) -> Side:
    """The answers that stand in a file: what ``sample`` printed, or rows of any format that hold answers."""
    path = str(Path(name).expanduser())
    plain = replace(data, path=path, sources=[], columns={}, format="auto", limit=None, eval_fraction=0.0)
    return _written(name, plain, held_out=False)


def from_rows(data: DataConfig) -> Side:
    """The answers of the rows themselves (the held-out ones where there are some): the chosen or best rated one."""
    held_out = holds_out(data)
    return _written(ROWS, data, held_out=held_out)


def from_model(config: RootConfig, name: str, prompts: list[Prompt], asked: list[Prompt] | None = None) -> Side:
    """What the configured model answers, generated once: the texts are kept in the cache by all that they depend on.

    ``asked`` are ``prompts`` as the model is to see them (under a condition), in the same order.
    """
    asked = asked or prompts
    config = replace(config, eval=replace(config.eval, num_samples=1))

    def build(folder: Path) -> None:
        texts = [answer.texts[0] for answer in sampled(config, asked, "evaluate judge=")]
        (folder / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")

    place = cache.obtain(KIND, cache.key(_depends_on(config, asked)), build)
    texts: list[str] = json.loads((place / "texts.json").read_text(encoding="utf-8"))
    return Side(name, {request_text(p.messages): t for p, t in zip(prompts, texts, strict=True)}, prompts)


def named(config: RootConfig, name: str) -> RootConfig:
    """The configuration with the run, model folder or hub model ``name`` in the place of its model."""
    path, _ = finished_model(name, "against")
    model = ModelConfig(path, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    return replace(config, model=model)


def distinct(sides: list[Side]) -> list[Side]:
    """The sides under names of their own: the second ``x`` is ``x (2)``."""
    seen: Counter[str] = Counter()
    made = []
    for side in sides:
        seen[side.name] += 1
        made.append(side if seen[side.name] == 1 else replace(side, name=f"{side.name} ({seen[side.name]})"))
    return made


def common(sides: list[Side], limit: int | None) -> tuple[list[str], int]:
    """(the prompts that every side answered, in the first side's order, at most ``limit``; how many only some did)."""
    shared = [text for text in sides[0].answers if all(text in side.answers for side in sides)]
    if not shared:
        raise DataError(f"judge: no prompt was answered by all of {', '.join(side.name for side in sides)}")
    everything = {text for side in sides for text in side.answers}
    return shared[:limit], len(everything) - len(shared)


def _written(name: str, data: DataConfig, *, held_out: bool) -> Side:
    side = Side(name, {})
    for source, row in samples_of(data, Needs(Unit.SEQUENCE), held_out=held_out):
        best = to_examples(row, Unit.SEQUENCE, by=source.rating)
        sample = best if best.sequences else row
        prompt, answer = prompt_of(sample), _answer(sample)
        text = request_text(prompt.messages)
        if answer is None or text in side.answers:
            side.left_out["no_answer" if answer is None else "repeated_prompt"] += 1
            continue
        side.answers[text] = answer
        side.prompts.append(prompt)
    if not side.answers:
        raise ConfigError(f"judge: {sources_of(data, held_out=held_out)[0].path} holds no answers to judge")
    return side


def _answer(sample: Sample) -> str | None:
    """The first answer of the row's first sequence; an empty one is an answer, which a judge may think little of."""
    said = sample.sequences[0].completion
    if isinstance(said, list):
        return next((str(turn.get("content") or "") for turn in said if turn["role"] == "assistant"), None)
    return said


def _depends_on(config: RootConfig, asked: list[Prompt]) -> dict[str, Any]:
    model, chosen = config.model, config.eval
    built_in = model.name_or_path == "tiny"
    return {
        "model": ["tiny", config.seed] if built_in else names.identify(model_folder(model)),
        "tokenizer": model.tokenizer_name_or_path and names.identify(model.tokenizer_name_or_path),
        "chat_template": model.chat_template and names.identify(model.chat_template),
        "dtype": model.dtype,
        "backend": chosen.backend,
        "sampling": [chosen.max_new_tokens, chosen.temperature, chosen.top_p, chosen.batch_size, config.seed],
        "prompts": [[prompt.messages, prompt.tools] for prompt in asked],
    }
