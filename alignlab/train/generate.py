"""Batched generation with Hugging Face ``generate``: used by ``sample``, ``evaluate`` and the verifier's figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[list[int]],
    *,
    stop_ids: list[int],
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
) -> Iterator[list[str]]:
    """Completions of each prompt (token ids, template and generation prompt included), in order.

    Prompts are padded on the left, positions follow the attention mask, so a batch's composition moves results by
    rounding only.  ``stop_ids`` end a completion.  ``temperature=0`` is greedy.
    Yields ``num_samples`` texts a prompt, special tokens removed.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)
    was_training, use_cache = model.training, model.config.use_cache
    model.eval()
    # The packed layouts leave their own attention selected; generation is a plain padded forward with a cache.
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        iterator = iter(prompts)
        while chunk := list(islice(iterator, batch_size)):
            longest = max(map(len, chunk))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in chunk], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in chunk], device=device)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    num_return_sequences=num_samples,
                    pad_token_id=pad,
                    eos_token_id=stop_ids,
                    use_cache=True,
                    **sampling,
                )
            texts = decoded(tokenizer, out[:, longest:].tolist(), stop_ids)
            for start in range(0, len(texts), num_samples):
                yield texts[start : start + num_samples]
    finally:
        model.set_attn_implementation(attention)
        model.config.use_cache = use_cache
        model.train(was_training)


def decoded(tokenizer: Any, rows: Sequence[Sequence[int]], stop_ids: list[int]) -> list[str]:
    """The texts of generated token ids, each up to its first stop, special tokens removed."""
    ended = []
    for row in rows:
        end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
        ended.append(list(row[:end]))
    texts: list[str] = tokenizer.batch_decode(ended, skip_special_tokens=True)
    return texts
