"""Low-rank adapters through peft, for every objective; a scalar head is trained and saved with the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignlab.config import PeftConfig
from alignlab.errors import ConfigError
from alignlab.models import fourbit


def apply_peft(model: Any, config: PeftConfig, head: str, seed: int) -> Any:
    """``model`` itself for ``none``, else a peft model around it whose adapter is drawn from ``seed``.

    With ``qlora`` the model's linear layers are put into 4 bits first, in place.
    """
    if config.name == "none":
        return model
    if config.name == "qlora":
        fourbit.pack_linears(model)
    elif fourbit.installed():
        fourbit.bitsandbytes("peft=lora")  # peft imports it, too; the first import is ours
    from peft import LoraConfig, get_peft_model

    modules: Any = config.lora_target_modules
    if modules != "all-linear":
        modules = [name.strip() for name in modules.split(",")]
        _refuse_output_layer(model, modules)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=modules,
        # peft never adapts the output layer under all-linear; the scalar head is not one to it, and is trained whole.
        modules_to_save=["score"] if head == "scalar" else None,
        task_type="SEQ_CLS" if head == "scalar" else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            raise ConfigError(f"peft.lora_target_modules: {str(error).splitlines()[0]}") from error


def _refuse_output_layer(model: Any, names: list[str]) -> None:
    """The output layer is computed in chunks by the scorer, which does not know of an adapter on it."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head and path.split(".")[-1] in names:
            raise ConfigError(f"peft.lora_target_modules: {path} is the output layer and cannot be adapted")


def merged(model: Any, config: PeftConfig, head: str, weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """(plain model with the adapter of ``weights`` merged in, the peft model that holds the adapter alone).

    ``weights`` is the peft model's whole state dict; ``model`` is the base as it was loaded.  A base that was held in
    4 bits becomes a plain one with the values it had there.
    """
    adapter = apply_peft(model, replace(config, name="lora"), head, 0)
    adapter.load_state_dict(fourbit.unpacked(weights, model.dtype))
    import copy

    plain = copy.deepcopy(adapter).merge_and_unload()
    return plain, adapter
