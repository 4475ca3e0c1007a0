"""The same as :func:`alignlab.train.generate.generate`, by vLLM (extra ``vllm``; ``eval.backend=vllm``).

vLLM makes batches by itself and needs the model as a folder or a hub name.  Prompts go to it as token ids, so that the
template is ours, and its token ids are decoded here, so that both backends end and clean a text alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from alignlab.config import ModelConfig
from alignlab.errors import ConfigError
from alignlab.train.generate import decoded

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
"""``model.dtype`` in vLLM's words."""


def load(model: ModelConfig, source: str, seed: int) -> Any:
    """vLLM's engine; ``source`` is the folder that ``model`` was found in.

    Raises :class:`ConfigError` without the package, and for a ``model.dtype`` that vLLM does not have.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(f"eval.backend=vllm needs vllm: pip install 'alignlab[vllm]' ({error})") from None
    if model.dtype not in DTYPES:
        raise ConfigError(f"eval.backend=vllm: model.dtype={model.dtype} (vLLM takes {', '.join(DTYPES)})")
    return LLM(
        model=source, tokenizer=model.tokenizer_name_or_path or source, dtype=DTYPES[model.dtype], seed=seed,
        trust_remote_code=model.trust_remote_code,
    )  # fmt: skip


def generate(
    engine: Any,
    tokenizer: Any,
    prompts: Iterable[list[int]],
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
) -> Iterator[list[str]]:
    """Completions of each prompt (token ids) by the engine of :func:`load`, in order."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        n=num_samples, temperature=temperature, top_p=top_p if temperature > 0 else 1.0, max_tokens=max_new_tokens,
        stop_token_ids=stop_ids, seed=seed,
    )  # fmt: skip
    for request in engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling):
        yield decoded(tokenizer, [made.token_ids for made in request.outputs], stop_ids)
