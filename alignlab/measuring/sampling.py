"""Answers of the configured model to prompts, by the backend the user chose: what ``sample`` prints, a judge reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.data.sources import Needs, holds_out
from alignlab.errors import ConfigError, DataError
from alignlab.measuring.verification import Answer, Prompt, answers, measured, prompts_of
from alignlab.models.load import load_model, resolve_dtype
from alignlab.models.source import model_folder
from alignlab.runs.job import make_encoder, make_objective, needs_of
from alignlab.train import generate_vllm
from alignlab.types import Unit


def asked(config: RootConfig, verb: str, *, conditioned: bool = True) -> list[Prompt]:
    """``eval.prompt``, or the prompts of the rows (the held-out ones where the configuration has some).

    A run of ``cpsft`` or ``cpo`` is asked under its data's conditions, unless they are not ``conditioned``.
    """
    if config.eval.prompt is not None:
        return [Prompt("prompt", [{"role": "user", "content": config.eval.prompt}])]
    if config.data.path is None and not config.data.sources:
        raise ConfigError(f"{verb}: nothing to answer; give eval.prompt='...' or data=<rows>")
    needs = needs_of(make_objective(config)) if config.objective is not None else Needs(Unit.SEQUENCE)
    held_out = holds_out(config.data)
    if not conditioned:
        needs = replace(needs, stage=None)
    prompts = list(prompts_of(config.data, needs, held_out=held_out, limit=config.eval.generate or None))
    if not prompts:
        raise DataError(f"{verb}: the rows have no prompt to answer")
    return prompts


class Sampler:
    """The configured model, ready to answer: loaded once, by the backend that ``eval.backend`` names.

    Raises :class:`ConfigError` for a model without a tokenizer; ``verb`` is what the user typed.
    """

    def __init__(self, config: RootConfig, verb: str) -> None:
        self.config = config
        self.tokenizer, self.encoder = make_encoder(config.model, config.data)
        if self.tokenizer is None:
            raise ConfigError(
                f"{verb}: {config.model.name_or_path} has no tokenizer; name one: model.tokenizer_name_or_path="
            )
        self._by_vllm = config.eval.backend == "vllm"
        if self._by_vllm:
            self._model = generate_vllm.load(config.model, model_folder(config.model), config.seed)
        else:
            dist.init(timeout=config.engine.timeout)
            dtype = resolve_dtype(config.model.dtype, dist.device())
            self._model = load_model(config.model, "lm", dtype, config.seed).model.to(dist.device())

    def answers(self, prompts: list[Prompt], *, seed: int | None = None, **changes: Any) -> Iterator[Answer]:
        """The answers to ``prompts``, measured, in order; ``eval.*`` with ``changes`` says how they are generated."""
        chosen = replace(self.config.eval, **changes)
        settings: dict[str, Any] = {
            "max_new_tokens": chosen.max_new_tokens, "temperature": chosen.temperature, "top_p": chosen.top_p,
            "num_samples": chosen.num_samples, "seed": self.config.seed if seed is None else seed,
        }  # fmt: skip
        if self._by_vllm:
            ids = (self.encoder.render_prompt(p.messages, p.tools) for p in prompts)
            stop_ids = self.encoder.stop_ids
            made = generate_vllm.generate(self._model, self.tokenizer, ids, stop_ids=stop_ids, **settings)
            return measured(prompts, made, chosen.verifier)
        return answers(
            self._model, self.tokenizer, self.encoder, prompts, batch_size=chosen.batch_size, verifier=chosen.verifier,
            **settings,
        )  # fmt: skip


def sampled(config: RootConfig, prompts: list[Prompt], verb: str) -> Iterator[Answer]:
    """The answers of the configured model as ``eval.*`` says; ConfigError for several greedy answers to a prompt."""
    chosen = config.eval
    if chosen.temperature == 0 and chosen.num_samples > 1:
        raise ConfigError(
            f"{verb}: eval.num_samples={chosen.num_samples} greedy answers would all be the same; set eval.temperature"
        )
    return Sampler(config, verb).answers(prompts)
