"""``alignlab sample RUN_OR_MODEL``: batched answers to prompts, one JSON object a line."""

from __future__ import annotations

import json

from alignlab import dist
from alignlab.cli import Request, emit
from alignlab.data.prepare import Needs
from alignlab.errors import ConfigError
from alignlab.job import make_encoder, make_objective, needs_of
from alignlab.models.load import load_model, resolve_dtype
from alignlab.types import Unit
from alignlab.verbs.evaluate import trained
from alignlab.verification import Prompt, answers, as_json, prompts_of


def run(request: Request) -> int:
    """Answer ``eval.prompt`` or the prompts of the rows (held-out ones where the configuration has some)."""
    config, _ = trained(request)
    tokenizer, encoder = make_encoder(config.model, config.data)
    if tokenizer is None:
        raise ConfigError(
            f"sample: {config.model.name_or_path} has no tokenizer; name one: model.tokenizer_name_or_path="
        )
    dist.init(timeout=config.engine.timeout)
    dtype = resolve_dtype(config.model.dtype, dist.device())
    loaded = load_model(config.model, "lm", dtype, config.seed)
    model = loaded.model.to(dist.device())
    if config.eval.prompt is not None:
        prompts = [Prompt("prompt", [{"role": "user", "content": config.eval.prompt}])]
    else:
        if config.data.path is None and not config.data.sources:
            raise ConfigError("sample: nothing to answer; give eval.prompt='...' or data=<rows>")
        needs = needs_of(make_objective(config)) if config.objective is not None else Needs(Unit.SEQUENCE)
        held_out = config.data.eval_path is not None or bool(config.data.eval_fraction)
        limit = config.eval.generate or None
        prompts = list(prompts_of(config.data, needs, held_out=held_out, limit=limit))
    found = []
    for answer in answers(
        model, tokenizer, encoder, prompts, batch_size=config.eval.batch_size,
        max_new_tokens=config.eval.max_new_tokens, verifier=config.eval.verifier,
        temperature=config.eval.temperature, top_p=config.eval.top_p, num_samples=config.eval.num_samples,
        seed=config.seed,
    ):  # fmt: skip
        found.append(answer)
        if request.json is not True:
            print(json.dumps(as_json([answer])[0], ensure_ascii=False), flush=True)
    emit(request, {"model": config.model.name_or_path, "answers": as_json(found)})
    return 0
