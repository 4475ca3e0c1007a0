"""Models by name: built-in, from folders, with a new or an old scalar head, and what is refused."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alignlab.config import ModelConfig
from alignlab.errors import ConfigError
from alignlab.models import tiny
from alignlab.models.head import ScalarHead
from alignlab.models.load import disable_dropout, load_model, resolve_dtype
from alignlab.models.source import fetch, folder_of, max_positions
from alignlab.models.tokens import load_tokenizer

FP32 = torch.float32


def load(name: object, head: str = "lm", dtype: torch.dtype = FP32, seed: int = 0, **options: Any) -> Any:
    return load_model(ModelConfig(name_or_path=str(name), **options), head, dtype, seed)


@pytest.fixture
def folder(tmp_path: Path, llama: Callable[..., Any]) -> Path:
    """A causal model without a tokenizer."""
    llama(dtype=FP32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tiny():
    one, again, other = load("tiny"), load("tiny"), load("tiny", seed=1)
    assert torch.equal(one.model.lm_head.weight, again.model.lm_head.weight)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert max(one.tokenizer.get_vocab().values()) < one.model.get_input_embeddings().num_embeddings
    assert max_positions(ModelConfig("tiny")) == one.model.config.max_position_embeddings
    assert one.model.config.use_cache is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiny_keeps_its_buffers(dtype):
    found = load("tiny", dtype=dtype).model
    assert {p.dtype for p in found.parameters()} == {dtype}
    plain = dict(tiny.load(0)[0].named_buffers())
    assert all(torch.equal(buffer, plain[name]) for name, buffer in found.named_buffers())


def test_tiny_as_reward_model_has_the_same_backbone_and_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    reward = load("tiny", "scalar", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    causal = load("tiny", seed=3)
    for name, value in causal.model.base_model.state_dict().items():
        assert torch.equal(reward.model.base_model.state_dict()[name], value)
    assert reward.fingerprint != causal.fingerprint


def test_a_folder(folder, llama):
    found = load(folder)
    assert found.tokenizer is None
    for name, value in llama(dtype=FP32).state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)
    assert found.name == str(folder)
    assert max_positions(ModelConfig(str(folder))) == 64
    assert load_tokenizer(ModelConfig(str(folder), tokenizer_name_or_path="tiny")) is not None


def test_the_fingerprint_is_of_the_weights(folder, llama):
    before = load(folder).fingerprint
    assert load(folder).fingerprint == before
    llama(dtype=FP32, seed=1).save_pretrained(folder)
    assert load(folder).fingerprint != before


def test_a_new_scalar_head_is_seeded_and_its_size_is_right(folder):
    one, again, other = load(folder, "scalar"), load(folder, "scalar"), load(folder, "scalar", seed=1)
    head = one.model.score
    assert isinstance(head, ScalarHead)
    assert head.bias is None
    assert head.weight.shape == (1, 16)
    assert torch.equal(head.weight, again.model.score.weight)
    assert not torch.equal(head.weight, other.model.score.weight)
    wide = torch.cat([load("tiny", "scalar", seed=seed).model.score.weight[0] for seed in range(8)])
    # Over a thousand values; the estimate's own deviation is 1 / sqrt(2 n), about 2 %.
    assert wide.std().item() == pytest.approx((tiny.HIDDEN + 1) ** -0.5, rel=0.1)


@pytest.mark.parametrize("name", ["folder", "tiny"])
def test_a_new_scalar_head_of_another_size(name, folder):
    """The same draws, scaled: usual weights are draws / sqrt(hidden + 1)."""
    path = folder if name == "folder" else name
    usual, small = load(path, "scalar"), load(path, "scalar", head_init_std=0.001)
    width = usual.model.score.in_features
    torch.testing.assert_close(small.model.score.weight, usual.model.score.weight * 0.001 * (width + 1) ** 0.5)
    assert small.fingerprint != usual.fingerprint
    assert load(path, head_init_std=0.001).fingerprint == load(path).fingerprint  # a language model has no such head


def test_a_stored_scalar_head_is_kept(folder, tmp_path):
    first = load(folder, "scalar", seed=4)
    first.model.save_pretrained(tmp_path / "reward")
    again = load(tmp_path / "reward", "scalar", seed=9, head_init_std=0.001)
    assert torch.equal(again.model.score.weight, first.model.score.weight)
    with pytest.raises(ConfigError, match="is a reward model"):
        load(tmp_path / "reward")


def test_a_reward_folder_that_lost_its_head_is_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    load(folder, "scalar").model.save_pretrained(tmp_path / "reward")
    file = tmp_path / "reward" / "model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks the weights score\.weight"):
        load(tmp_path / "reward", "scalar")


def test_missing_weights_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj"):
        load(folder)


def test_pickled_weights_are_refused(folder):
    weights = load(folder).model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load(folder)


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran foreign code')\n")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder)


def test_a_tokenizer_larger_than_the_embedding(folder):
    tiny.tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match="the embedding only 37 rows"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [("./nowhere", "no model folder at"), ("/no/such/thing", "no model folder at"), ("a/b/c", "no model folder at")],
)
def test_no_such_folder(name, words):
    with pytest.raises(ConfigError, match=words):
        load(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path)


def test_offline_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        load("nobody/no-such-model")
    assert "\n" not in str(caught.value)
    assert "nobody/no-such-model" in str(caught.value)


def test_attention_sinks_load_with_their_own_attention(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    assert load(tmp_path).model.config._attn_implementation == "eager"


def test_resolve_dtype():
    assert resolve_dtype("auto", torch.device("cpu")) == FP32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("fp64", torch.device("cpu")) == torch.float64
    with pytest.raises(ConfigError, match="none of auto, fp32"):
        resolve_dtype("int8", torch.device("cpu"))


def test_disable_dropout():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).train()
    ids = torch.arange(12)[None] % 20
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    assert model.config.attn_pdrop == 0.1


class Hub:
    """Stands in for ``snapshot_download``: what is on the hub, what is here, and what was asked over the network."""

    def __init__(self, folder: Path, remote: dict[str, str]) -> None:
        self.folder, self.remote = folder, remote
        self.asked: list[tuple[str, str | None, bool]] = []

    def __call__(
        self, name: str, *, revision: str | None = None, local_files_only: bool = False, allow_patterns: Any = None
    ) -> str:
        if local_files_only:
            if not self.folder.is_dir():
                raise FileNotFoundError(name)
            return str(self.folder)
        self.asked.append((name, revision, "*.safetensors" in allow_patterns))
        if not self.remote:
            raise FileNotFoundError("no connection")
        self.folder.mkdir(exist_ok=True)
        for file, text in self.remote.items():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (self.folder / file).write_text(text)
        return str(self.folder)


SHARDS = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'


def test_a_hub_model_is_fetched_once_and_without_its_weights_where_none_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors", "pytorch_model.bin")
    hub = Hub(tmp_path / "snapshot", dict.fromkeys(files, "{}") | {"model.safetensors.index.json": SHARDS})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr("alignlab.data.hub.commit", lambda *_: "abc")
    config = ModelConfig(name_or_path="owner/name", revision="abc")
    assert folder_of(config) == folder_of(config) == str(hub.folder)
    assert hub.asked == [("owner/name", "abc", False)], "the small files, once"
    assert not list(hub.folder.glob("*.safetensors"))
    fetch(config)
    folder_of(config, weights=True)
    assert hub.asked[1:] == [("owner/name", "abc", True)], "the weights, once: training opens no connection"
    assert not (hub.folder / "pytorch_model.bin").exists(), "pickles stay where they are"
    (hub.folder / "model-2.safetensors").unlink()
    fetch(config)
    assert len(hub.asked) == 3, "half a snapshot is completed"


def test_a_name_that_is_nowhere_is_answered_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path / "none", {}))
    monkeypatch.setattr("alignlab.data.hub.commit", lambda *_: "abc")
    with pytest.raises(ConfigError, match=r"no folder tinny here, and the hub .* did you mean tiny\?"):
        folder_of(ModelConfig(name_or_path="tinny"))
