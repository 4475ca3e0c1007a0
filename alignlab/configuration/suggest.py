"""What to say of a key that does not exist: the nearest ones, where they live, and what other programs call them."""

from __future__ import annotations

import difflib

from alignlab.configuration import schema
from alignlab.errors import ConfigError

ALIASES = {
    "lr": "optim.learning_rate",
    "optimizer": "optim",
    "model_name_or_path": "model",
    "base_model": "model",
    "tokenizer": "model.tokenizer_name_or_path",
    "torch_dtype": "model.dtype",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "datasets": "data.sources",
    "eval_dataset": "data.eval_path",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "packing": "model.layout",
    "padding_free": "model.layout",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "n_epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "warmup": "optim.warmup_ratio",
    "scheduler": "optim.lr_scheduler_type",
    "deepspeed": "engine",
    "zero_stage": "engine",
    "lora_rank": "peft.lora_r",
    "lora": "peft",
    "report_to": "logger",
    "resume_from_checkpoint": "resume",
    "ref_model": "reference.name_or_path",
    "reference_model": "reference.name_or_path",
    "loss": "objective",
    "pref_beta": "objective.beta",
    "dpo_loss_type": "objective.loss_type",
    "data_seed": "seed",
    "name": "run.name",
    "run_name": "run.name",
    "world_size": "launch.nproc",
}
"""What other programs call it; never accepted, only pointed out."""


def nearest(name: str, known: schema.Schema, groups: tuple[str, ...], count: int = 3) -> list[str]:
    """The existing keys or groups most like ``name``, best first: the leaf's spelling counts most, then the section."""
    section, _, leaf = name.lower().rpartition(".")
    if leaf in ALIASES and (ALIASES[leaf] in known or ALIASES[leaf] in groups):
        return [ALIASES[leaf]]

    def likeness(candidate: str) -> float:
        their_section, _, their_leaf = candidate.lower().rpartition(".")
        same_leaf = difflib.SequenceMatcher(None, leaf, their_leaf).ratio()
        same_section = (
            1.0 if section == their_section else difflib.SequenceMatcher(None, section, their_section).ratio()
        )
        return 3 * same_leaf + same_section

    candidates = [*known, *(groups if not section else ())]
    ranked = sorted(candidates, key=lambda c: (-likeness(c), c))
    best = likeness(ranked[0])
    return [c for c in ranked[:count] if likeness(c) >= max(1.8, best - 0.4)]


def unknown_key(name: str, known: schema.Schema, groups: tuple[str, ...], hints: dict[str, str]) -> ConfigError:
    """The one line that answers a key nobody knows."""
    leaf = name.rpartition(".")[2]
    if leaf in hints:
        return ConfigError(f"unknown key '{name}': {hints[leaf]}")
    near = nearest(name, known, groups)
    advice = f"did you mean {' or '.join(near)}?" if near else "`alignlab show` lists all keys"
    return ConfigError(f"unknown key '{name}': {advice}")
