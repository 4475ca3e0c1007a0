"""Models by name, their weights read: safetensors only, no code of foreign origin, the head an objective needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignlab.config import ModelConfig
from alignlab.errors import ConfigError
from alignlab.models.head import ScalarHead
from alignlab.models.source import fingerprint_of, folder_of, has_stored_head, hf_configuration, one_line
from alignlab.models.tokens import check_vocabulary, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Loaded:
    """A model on the host with its tokenizer (None for a folder that has none)."""

    model: Any
    tokenizer: Any
    name: str
    dtype: torch.dtype
    identify: Callable[[], str]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights as they were loaded: part of the key of cached reference numbers.

        Reads every weight file, so it is made when first asked for.
        """
        return self.identify()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 on a GPU (the engines keep fp32 master weights)."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"model.dtype: '{name}' is none of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(config: ModelConfig, head: str, dtype: torch.dtype, seed: int) -> Loaded:
    """The model of ``config`` with the head an objective needs.

    ``lm``: a causal language model.  ``scalar``: a sequence-classification model with one label; where the folder holds
    a causal model the backbone is loaded and the head made anew from ``seed``, without bias, in float32, its weights of
    deviation ``config.head_init_std``.  Raises ConfigError for a name that cannot be loaded, weights that are missing,
    and a tokenizer larger than the embedding.
    """
    tokenizer = load_tokenizer(config)
    if config.name_or_path == "tiny":
        model = _tiny(config, head, dtype, seed)
        text = model.config.to_json_string()

        def identify() -> str:
            return hashlib.sha256(f"{text}/{head}/{seed}{_head_size(config, head)}".encode()).hexdigest()
    else:
        source = folder_of(config, weights=True)
        _no_bars()
        model = _pretrained(config, source, head, dtype, seed)

        def identify() -> str:
            drawn = f"{seed}{_head_size(config, head)}" if head == "scalar" else ""
            return f"{fingerprint_of(Path(source), config)}/{head}/{drawn}"

    model.config.use_cache = False
    check_vocabulary(model, tokenizer, config.name_or_path)
    return Loaded(model, tokenizer, config.name_or_path, dtype, identify)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and routing jitter to 0: log-probabilities of policy and reference must be of one function.

    The configuration keeps its values, so an exported model has them still.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter")):
                setattr(module, name, 0.0)


def _no_bars() -> None:
    """Weights are read and written in silence from here on; a download, before, shows its progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _pretrained(config: ModelConfig, source: str, head: str, dtype: torch.dtype, seed: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    options: dict[str, Any] = {
        "revision": config.revision, "trust_remote_code": config.trust_remote_code, "use_safetensors": True,
        "attn_implementation": config.attn_implementation, "dtype": dtype, "output_loading_info": True,
    }  # fmt: skip
    if head == "scalar":
        options["num_labels"] = 1
    hf = hf_configuration(config, source)
    stored_head = has_stored_head(hf, head, config.name_or_path)
    with one_line("model", config.name_or_path):
        try:
            model, report = kind.from_pretrained(source, **options)
        except ValueError as error:
            # Families with attention sinks have no kernel of torch's for padded rows; eager is theirs.
            if config.attn_implementation != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
            model, report = kind.from_pretrained(source, **options | {"attn_implementation": "eager"})
    missing = sorted(
        set(report["missing_keys"]) - ({"score.weight"} if head == "scalar" and not stored_head else set())
    )
    missing += [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ConfigError(
            f"model: {config.name_or_path} lacks the weights {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    if head == "scalar":
        _scalar_head(model, config, seed, keep=stored_head)
    return model


def _tiny(config: ModelConfig, head: str, dtype: torch.dtype, seed: int) -> Any:
    from alignlab.models import tiny

    causal, _ = tiny.load(seed)
    model: Any = causal
    if head == "scalar":
        from transformers import AutoModelForSequenceClassification

        causal.config.num_labels = 1
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForSequenceClassification.from_config(causal.config)
        model.base_model.load_state_dict(causal.base_model.state_dict())
        _scalar_head(model, config, seed, keep=False)
    for parameter in model.parameters():  # buffers keep their dtype: rotary frequencies in bfloat16 are other positions
        parameter.data = parameter.data.to(dtype)
    return model


def _head_size(config: ModelConfig, head: str) -> str:
    """What besides the seed says which weights a new head has; empty for the usual deviation."""
    return f"/{config.head_init_std}" if head == "scalar" and config.head_init_std is not None else ""


def _scalar_head(model: Any, config: ModelConfig, seed: int, *, keep: bool) -> None:
    """A bias-free scalar head in float32: the stored one, or one drawn from ``seed`` as ``config.head_init_std`` says.

    With a bias the absolute terms of the Eurus objective could move zero instead of the rewards.
    """
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(
            f"reward models of the family {type(model).__name__} are not supported: no linear 'score' head"
        )
    old = model.score
    dtype = torch.promote_types(old.weight.dtype, torch.float32)
    head = nn.utils.skip_init(ScalarHead, old.in_features, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        if keep:
            head.weight.copy_(old.weight)
        else:
            drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
            std = config.head_init_std
            head.weight.copy_(drawn / (old.in_features + 1) ** 0.5 if std is None else drawn * std)
    model.score = head
