"""What the comparisons with TRL share: tiny fp32 models, a tokenizer, the same ids for both sides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.data.index import Index, IndexWriter
from alignlab.testing import VOCABULARY, tiny_model
from alignlab.types import EncodedSample, EncodedSequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

Ids = list[int]


def sequence(prompt: Ids, answer: Ids) -> EncodedSequence:
    tokens = np.array(prompt + answer, dtype=np.int32)
    return EncodedSequence(tokens, np.arange(len(tokens)) >= len(prompt))


def index_of(folder: Path, rows: list[dict[str, Any]]) -> Index:
    """``rows``: prompt and answers (ids), pairs, and numbers for sequences and pairs."""
    with IndexWriter(folder) as writer:
        for number, row in enumerate(rows):
            pairs = np.array(row.get("pairs", []), dtype=np.int32).reshape(-1, 2)
            writer.add(
                EncodedSample(
                    id=str(number), source="", sequences=[sequence(row["prompt"], a) for a in row["answers"]],
                    pairs=pairs,
                    sequence_values={k: np.array(v, dtype=np.float32) for k, v in row.get("values", {}).items()},
                    pair_values={k: np.array(v, dtype=np.float32) for k, v in row.get("pair_values", {}).items()},
                )
            )  # fmt: skip
        return writer.close({})


def random_rows(seed: int, count: int, answers: int) -> list[dict[str, Any]]:
    """Prompts of 2 to 6 tokens, answers of 1 to 8."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> Ids:
        return rng.integers(3, VOCABULARY, rng.integers(low, high)).tolist()

    return [{"prompt": draw(2, 7), "answers": [draw(1, 9) for _ in range(answers)]} for _ in range(count)]


def logps(model: Any, prompt: Ids, answer: Ids) -> float:
    """Summed log-probability of the answer: a plain forward of one row."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return found.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()


def gradient_norm(gradients: Any) -> float:
    return sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5


def trl_step(trainer: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """(loss, gradient norm) of TRL's own ``compute_loss`` on one batch."""
    model = trainer.model
    model.train()
    model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.item(), gradient_norm(p.grad for p in model.parameters() if p.grad is not None)


@pytest.fixture(scope="session")
def policy() -> Any:
    return tiny_model("lm", 0).float()


@pytest.fixture(scope="session")
def reference() -> Any:
    """Near the policy, as after some training."""
    model = tiny_model("lm", 0).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tools() -> dict[str, Callable[..., Any]]:
    return {
        "index_of": index_of,
        "random_rows": random_rows,
        "logps": logps,
        "gradient_norm": gradient_norm,
        "trl_step": trl_step,
    }
