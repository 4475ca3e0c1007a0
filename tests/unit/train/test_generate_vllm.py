"""What vLLM is told, by a stand-in for the package: it runs on a GPU only."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from alignlab.config import ModelConfig
from alignlab.errors import ConfigError
from alignlab.models import tiny
from alignlab.train.generate_vllm import generate, load


class FakeLLM:
    """The part of ``vllm.LLM`` that is used: it answers each prompt with its own tokens, a stop, and more."""

    made: list[dict[str, Any]]

    def __init__(self, **options: Any) -> None:
        FakeLLM.made.append(options)

    def generate(self, prompts: list[dict[str, list[int]]], sampling: dict[str, Any]) -> list[Any]:
        FakeLLM.made.append({"prompts": prompts, **sampling})
        stop = sampling["stop_token_ids"][0]
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=(*one["prompt_token_ids"], stop, 7))] * sampling["n"]
            )
            for one in prompts
        ]  # fmt: skip


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    FakeLLM.made = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **options: options))
    return FakeLLM.made


def test_prompts_go_in_as_tokens_and_texts_come_out_to_the_first_stop(vllm: list[dict[str, Any]]) -> None:
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer.encode("two words"), tokenizer.encode("three more words")]
    model = ModelConfig("runs/x/model", dtype="bf16")
    texts = list(
        generate(
            load(model, "/folder", 5), tokenizer, iter(prompts), stop_ids=[tokenizer.eos_token_id], max_new_tokens=9,
            temperature=0.7, top_p=0.9, num_samples=2, seed=5,
        )
    )  # fmt: skip
    assert texts == [["two words"] * 2, ["three more words"] * 2]
    assert vllm[0] == {
        "model": "/folder", "tokenizer": "/folder", "dtype": "bfloat16", "seed": 5, "trust_remote_code": False,
    }  # fmt: skip
    assert vllm[1] == {
        "prompts": [{"prompt_token_ids": ids} for ids in prompts], "n": 2, "temperature": 0.7, "top_p": 0.9,
        "max_tokens": 9, "stop_token_ids": [tokenizer.eos_token_id], "seed": 5,
    }  # fmt: skip


def test_greedy_has_no_nucleus(vllm: list[dict[str, Any]]) -> None:
    tokenizer = tiny.tokenizer()
    engine = load(ModelConfig("m"), "m", 0)
    list(generate(engine, tokenizer, [[5]], stop_ids=[1], max_new_tokens=1, temperature=0.0, top_p=0.5))
    assert (vllm[1]["temperature"], vllm[1]["top_p"], vllm[0]["dtype"]) == (0.0, 1.0, "auto")


def test_what_it_cannot_do_is_one_line(vllm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype=fp64"):
        load(ModelConfig("m", dtype="fp64"), "m", 0)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignlab\[vllm\]'"):
        load(ModelConfig("m"), "m", 0)
