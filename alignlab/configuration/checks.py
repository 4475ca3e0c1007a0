"""What a well-typed value must still satisfy: choices, ranges, rules between keys, and no secrets.

Each function returns the problems it finds, one line each, so that a command reports all of them together.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig

LOGGERS = ("jsonl", "wandb", "tensorboard")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "fp32", "bf16", "fp64"),
    "model.layout": ("auto", "tree", "packed", "rows"),
    "data.overlong": ("drop", "cut", "error"),
    "data.leaks": ("error", "drop", "keep"),
    "data.history_reasoning": ("keep", "drop"),
    "data.merge_prompts": ("false", "true", "global"),
    "data.condition.position": ("user", "system"),
    "data.condition.value": ("correct", "released"),
    "optim.name": ("adamw", "rmsprop", "adamw_8bit"),
    "optim.lr_scheduler_type": ("cosine", "linear", "constant"),
    "engine.name": ("auto", "local", "zero0", "zero1", "zero2", "zero3"),
    "peft.name": ("none", "lora", "qlora"),
    "launch.name": ("auto", "inline", "torchrun", "slurm", "sbatch"),
    "train.nonfinite": ("stop", "skip"),
    "eval.backend": ("hf", "vllm"),
}

POSITIVE = (
    "model.head_init_std",
    "engine.timeout",
    "peft.lora_r",
    "peft.lora_alpha",
    "train.global_batch_size",
    "train.per_device_train_batch_size",
    "train.token_budget",
    "train.num_train_epochs",
    "train.max_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.export_steps",
    "train.logging_steps",
    "data.limit",
    "data.num_proc",
    "eval.batch_size",
    "eval.limit",
    "eval.max_new_tokens",
    "eval.num_samples",
    "launch.nnodes",
    "launch.gpus_per_node",
    "launch.cpus_per_task",
    "optim.eps",
)
NOT_NEGATIVE = (
    "seed",
    "data.condition.seed",
    "optim.learning_rate",
    "optim.weight_decay",
    "optim.warmup_steps",
    "optim.max_grad_norm",
    "eval.generate",
    "eval.temperature",
)
FRACTIONS = ("optim.warmup_ratio", "eval.top_p", "data.max_reject_fraction", "data.condition.drop")
BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.alpha", "peft.lora_dropout", "data.eval_fraction")
NUMBER_OR_AUTO = ("data.max_length", "launch.nproc")

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}"
    r"|\bA[KS]IA[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bglpat-[A-Za-z0-9_-]{16,}|\bAIza[0-9A-Za-z_-]{30,}"
    r"|\bnpm_[A-Za-z0-9]{30,}|\bpypi-[A-Za-z0-9_-]{30,}|\b(?i:bearer) [A-Za-z0-9._~+/-]{16,}=*"
    r"|\beyJ[A-Za-z0-9_-]{10,1000}\.eyJ[A-Za-z0-9_-]{5,1000}\.[A-Za-z0-9_-]*"
    r"|(?i:[a-z][a-z0-9+.-]{0,20})://[^/\s:@]{0,100}:[^/\s@]{1,200}@"
    r"|[?&](?i:[a-z_-]{0,20}(?:token|key|secret|password|signature|sig))=[^&\s]{8,}"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[^-]{0,10000}-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
)
"""Every repetition has an end: the text may be long and of foreign make."""

_SECRET_NAME = re.compile(r"(?i)(^|_)(token|key|secret|password|passwd|credentials?)(_|$)")
"""Environment variables whose values are secrets, whatever they look like (``WANDB_API_KEY``, ``HF_TOKEN``)."""


def _in_environment() -> list[str]:
    return sorted(
        (v for name, v in os.environ.items() if _SECRET_NAME.search(name) and len(v) >= 8), key=len, reverse=True
    )


def looks_secret(text: str) -> bool:
    """Whether ``text`` holds what looks like a token, a key or a password, or a secret of the environment."""
    return _SECRETS.search(text) is not None or any(value in text for value in _in_environment())


def redact(text: str) -> str:
    """``text`` with everything struck out that looks like a secret or is one of the environment's."""
    for value in _in_environment():
        text = text.replace(value, "[redacted]")
    return _SECRETS.sub("[redacted]", text)


KERNEL = re.compile(r"[A-Za-z][A-Za-z0-9_|]*")
"""Attention implementations that are in transformers or installed; others are names of code on the hub."""

COMMIT = re.compile(r"[0-9a-f]{40}")


def value_problem(key: str, value: Any) -> str | None:
    """What is wrong with one value of the right type, as ``expected ...``; None if nothing is."""
    if value is None:
        return None
    if key in CHOICES and value not in CHOICES[key]:
        near = difflib.get_close_matches(str(value), CHOICES[key], n=1)
        return f"expected one of {', '.join(CHOICES[key])}" + (f"; did you mean {near[0]}?" if near else "")
    if key in POSITIVE and not value > 0:
        return "expected more than 0"
    if key in NOT_NEGATIVE and not value >= 0:
        return "expected 0 or more"
    if key in FRACTIONS and not 0 <= value <= 1:
        return "expected a share between 0 and 1"
    if key in BELOW_ONE and not 0 <= value < 1:
        return "expected at least 0 and less than 1"
    if key in NUMBER_OR_AUTO and value != "auto" and not re.fullmatch(r"[1-9][0-9]*", str(value)):
        return "expected auto or a whole number above 0"
    if key == "logger.names":
        unknown = [name for name in value if name not in LOGGERS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], LOGGERS, n=1)
            return f"expected loggers among {', '.join(LOGGERS)}" + (f"; did you mean {near[0]}?" if near else "")
    if key == "run.name" and (not RUN_NAME.fullmatch(value) or value.endswith(".")):
        return "expected 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
    if key == "model.attn_implementation" and not KERNEL.fullmatch(value):
        return "expected the name of an installed kernel (sdpa, eager, flash_attention_2, ...), not code from the hub"
    if key == "launch.time" and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", value):
        return "expected a Slurm time such as 24:00:00 or 2-00:00:00"
    if key == "launch.extra" and any("\n" in line for line in value):
        return "expected one line an entry"
    if key in ("launch.partition", "launch.account") and not re.fullmatch(r"[A-Za-z0-9._,@-]+", value):
        return "expected a name"
    return None


def file_like(text: str) -> bool:
    """Whether ``text`` can only mean a local path: absolute, relative with a dot, or with a data file's ending."""
    return text.startswith(("/", "./", "../", "~/")) or bool(re.search(r"\.(jsonl|json|parquet|ya?ml)(\.gz)?$", text))


def config_problems(config: RootConfig) -> Iterator[str]:
    """Rules between keys, and local files that are not there."""
    data, launch, engine = config.data, config.launch, config.engine
    if problem := value_problem("logger.names", config.logger.names):
        yield f"logger: [{', '.join(config.logger.names)}] ({problem})"
    if config.eval.shadow or config.eval.shadow_options or config.eval.probe_path:
        from alignlab.configuration.shadows import shadow_problems  # it loads objectives, which others do without

        yield from shadow_problems(config)
    if data.path is not None and data.sources:
        yield "data.path and data.sources: give one of them"
    if data.eval_path is not None and data.eval_fraction > 0:
        yield "data.eval_path and data.eval_fraction: give one of them"
    for number, source in enumerate(data.sources):
        if source.weight <= 0:
            yield f"data.sources[{number}].weight: {source.weight} (expected more than 0)"
    paths = [("data.path", data.path), ("data.eval_path", data.eval_path), ("eval.probe_path", config.eval.probe_path)]
    paths += [(f"data.sources[{number}].path", source.path) for number, source in enumerate(data.sources)]
    paths += [
        ("model.name_or_path", config.model.name_or_path),
        ("model.tokenizer_name_or_path", config.model.tokenizer_name_or_path),
        ("reference.name_or_path", config.reference.name_or_path),
    ]
    for key, path in paths:
        if path is not None and file_like(path) and not Path(path).exists():
            yield f"{key}: no such file or folder: {path}"
        elif path == "":
            yield f"{key}: empty"
    if config.model.trust_remote_code and not COMMIT.fullmatch(config.model.revision or ""):
        for name in filter(None, (config.model.name_or_path, config.model.tokenizer_name_or_path)):
            if "/" in name and not Path(name).exists():
                yield (
                    f"model.trust_remote_code: {name} is on the hub, where the code behind a name can change; "
                    "add model.revision=<commit, 40 hex digits>"
                )
    if config.resume not in ("auto", "never") and not Path(config.resume).exists():
        yield f"resume: no checkpoint at {config.resume} (expected auto, never or a checkpoint's path)"
    many = launch.nnodes > 1 or (launch.nproc != "auto" and int(launch.nproc) > 1)
    if engine.name == "local" and many:
        yield "engine=local is one process: drop launch.nproc and launch.nnodes, or take engine=zero0 .. zero3"
    if launch.name == "inline" and many:
        yield "launch=inline is one process: drop launch.nproc and launch.nnodes, or take launch=torchrun"
    if launch.nnodes > 1 and launch.name not in ("slurm", "sbatch"):
        yield "launch.nnodes: several nodes need launch=slurm or launch=sbatch"
    if config.model.dtype == "fp64" and engine.name not in ("auto", "local"):
        yield f"model.dtype=fp64 works with engine=local only, not with engine={engine.name}"
    if config.peft.name == "qlora" and engine.name == "zero3":
        yield (
            "peft=qlora works with engine=local and zero0 .. zero2: zero3 would cut the packed 4-bit weights apart, "
            "and has little left to save"
        )
    if config.peft.name == "qlora" and config.model.dtype == "fp64":
        yield "peft=qlora works with model.dtype=fp32 and bf16, not with fp64"
    if config.train.torch_compile and engine.name == "zero3":
        yield "train.torch_compile works with engine=local and zero0 .. zero2: zero3 gathers weights between the layers"
    if engine.offload_optimizer and engine.name in ("auto", "local", "zero0"):
        yield "engine.offload_optimizer needs engine=zero1, zero2 or zero3"
