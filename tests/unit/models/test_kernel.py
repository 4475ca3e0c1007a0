"""Which form of attention plan a model gets, decided with imitated kernels on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from alignlab.errors import ConfigError
from alignlab.models import kernel
from alignlab.models.scorer import Scorer
from alignlab.ops import ragged
from alignlab.ops.ragged import naive_ragged_attention
from alignlab.ops.ragged_kernels import Call, Kernel, torch_varlen
from alignlab.types import Ask

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def make(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **(SIZES | options))
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Any, scaling: Any, window: Any, softcap: Any) -> Tensor:
    gathered = plan._replace(kv_index=torch.arange(len(key)))
    return naive_ragged_attention(query, key, value, gathered, scaling, window, softcap)


SOUND = Kernel("sound", attend, lambda call: "")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    """An H100 that is none, with one kernel for every dtype."""

    def install(found: Kernel) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(ragged, "kernels", lambda: (found,))
        monkeypatch.setattr(ragged, "disproof", lambda *arguments: "")
        ragged.kernel_for.cache_clear()

    yield install
    ragged.kernel_for.cache_clear()


def test_what_families_ask_of_their_attention() -> None:
    (llama,) = kernel.attention_calls(make("llama"))
    assert llama == Call(8, 8, 2, None, False, False, False)
    # Gemma 2: capped scores, its own scale, every second layer with a window.
    gemma = kernel.attention_calls(
        make("gemma2", head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, sliding_window=16)
    )
    assert {call.windowed for call in gemma} == {True, False}
    assert all(call.capped and call.head_dim == 16 for call in gemma)
    assert {round(call.own_scale, 6) for call in gemma} == {round(24**-0.5, 6)}


def test_without_a_small_copy_the_groups_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "small_copy", lambda *arguments: 1 / 0)
    assert kernel.takes_ragged(make("llama"), "tree", torch.bfloat16, CUDA) == (
        False,
        "no small copy shows its attention calls",
    )


def test_ragged_where_every_layer_can(installed: Callable[[Kernel], None]) -> None:
    installed(SOUND)
    model = make("llama")
    assert kernel.takes_ragged(model, "tree", torch.bfloat16, CUDA) == (True, "sound")
    assert kernel.takes_ragged(model, "packed", torch.bfloat16, CUDA) == (True, "sound")
    assert kernel.takes_ragged(model, "tree", torch.float32, CUDA) == (False, "no kernel for float32")
    assert kernel.takes_ragged(model, "rows", torch.bfloat16, CUDA) == (False, "")
    assert kernel.takes_ragged(model, "tree", torch.float32, CPU) == (False, "")
    assert kernel.takes_ragged(make("llama", head_dim=12), "tree", torch.bfloat16, CUDA)[1].startswith(
        "heads of size 12"
    )


@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_both_forms_agree_in_the_model(monkeypatch: pytest.MonkeyPatch, layout: str, head: str) -> None:
    model = make("llama")
    if head == "scalar":
        torch.manual_seed(0)
        model = hf.AutoModelForSequenceClassification.from_config(hf.LlamaConfig(**SIZES, num_labels=1)).eval()
    batch = kernel.comparison_batch(model, layout, CPU)
    assert batch.position_ids.max() < 64  # the model has no more positions
    monkeypatch.setattr(ragged, "kernel_for", lambda *arguments: (SOUND, ""))
    found = kernel.difference(Scorer(model, head, layout), batch, head)
    assert 0 <= found < 1e-5
    # A kernel that sees one key less at the end of every node's past is far off.
    blind = Kernel("blind", lambda q, k, v, plan, *o: attend(q, k, v.flip(0), plan, *o), lambda call: "")
    monkeypatch.setattr(ragged, "kernel_for", lambda *arguments: (blind, ""))
    wrong = kernel.difference(Scorer(model, head, layout), batch, head)
    assert wrong > 100 * max(found, 1e-7)
    if head == "scalar":  # a small head makes small rewards, and the mistake no smaller
        model.score.weight.data.mul_(1e-3)
        assert kernel.difference(Scorer(model, head, layout), batch, head) == pytest.approx(wrong, rel=1e-3)


def test_what_counts_as_agreement() -> None:
    assert kernel.agrees(0.2, torch.bfloat16)
    assert not kernel.agrees(0.2, torch.float16)
    assert not kernel.agrees(float("nan"), torch.bfloat16)


def test_a_plan_without_groups_needs_a_kernel() -> None:
    """On a CPU it is refused, with the reason: nothing is computed silently otherwise."""
    model = make("llama")
    scorer, batch = Scorer(model, "lm", "tree"), kernel.comparison_batch(model, "tree", CPU)
    assert batch.plan is not None
    with pytest.raises(ConfigError, match="no ragged kernel: no kernel for a cpu"):
        scorer(batch._replace(plan=batch.plan._replace(groups=())), Ask())
    assert kernel.difference(scorer, batch, "lm") == float("inf")


@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_the_ragged_path_of_the_installed_torch_reads_no_number(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """A model without contents, in bfloat16, through torch's own operator: whoever asked for a number would fail."""
    from torch.nn.attention.varlen import varlen_attn

    installed = torch_varlen(varlen_attn)
    monkeypatch.setattr(ragged, "kernel_for", lambda *arguments: (installed, ""))
    model = make("llama").to(device="meta", dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = kernel.comparison_batch(model, layout, torch.device("meta"))
    assert batch.plan is not None
    logps = Scorer(model, "lm", layout)(batch._replace(plan=batch.plan._replace(groups=()))).logps
    assert logps is not None
    assert logps.shape == batch.targets.shape
    logps.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
