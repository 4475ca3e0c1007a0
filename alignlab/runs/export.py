"""A trained policy or reward model as a plain Hugging Face folder, re-opened and compared before it counts.

``transformers``, vLLM and lm-eval load the folder as it is.  A LoRA run is merged into the model, and its adapter is
written beside it.  A reward model becomes a sequence-classification folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from alignlab import __version__
from alignlab.errors import StorageError
from alignlab.models.adapters import merged
from alignlab.models.load import load_model
from alignlab.runs.job import Job


def export_model(job: Job, target: Path) -> None:
    """Write the model as it stands now to ``target`` (and ``../adapter`` with peft).  Collective; rank 0 writes.

    Raises :class:`StorageError` when what is on disk is not what is in memory; ``target`` then does not exist.
    """
    state = job.engine.full_state_dict()
    if job.engine.rank == 0:
        prefix = "model."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if job.config.peft.name != "none":
            fresh = load_model(job.config.model, job.data.objective.head, job.loaded.dtype, job.config.seed)
            model, adapter = merged(fresh.model, job.config.peft, job.data.objective.head, weights)
            _publish(target.with_name("adapter"), adapter.save_pretrained)
            weights = dict(model.state_dict())
        else:
            model = job.loaded.model
        pad = _pad_id(job)
        _publish(target, lambda folder: _write(job, model, weights, pad, folder))
    job.engine.barrier()


def _write(job: Job, model: Any, weights: Mapping[str, Tensor], pad: int | None, folder: Path) -> None:
    before = model.config.pad_token_id
    model.config.pad_token_id = pad
    try:
        model.save_pretrained(folder, state_dict=_untied(model, weights))
    finally:
        model.config.pad_token_id = before
    if job.data.tokenizer is not None:
        tokenizer = copy.deepcopy(job.data.tokenizer)
        # Also where there was none: a foreign tokenizer's other templates would be written under names of its choice.
        tokenizer.chat_template = job.data.encoder.template
        if job.data.objective.head == "scalar":
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)  # what it pads with is what pooling skips
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_card(job), encoding="utf-8")
    _check(folder, weights)


def _untied(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the second names of tied weights: they are one tensor, and loading ties them again."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: value for name, value in weights.items() if name not in tied}


def _check(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Every tensor on disk is the one in memory, none is empty, none is missing but second names of tied ones."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                found[name] = stored.get_tensor(name)
    pointers = {value.data_ptr() for name, value in weights.items() if name in found}
    for name, value in weights.items():
        if name not in found:
            if value.data_ptr() not in pointers and not any(torch.equal(value, one) for one in found.values()):
                raise StorageError(f"{folder}: '{name}' was not written")
        elif found[name].numel() == 0 or not torch.equal(found[name], value.to(found[name].dtype).cpu()):
            raise StorageError(f"{folder}: '{name}' on disk is not the model's")


def _publish(target: Path, write: Any) -> None:
    """``write(folder)`` into a staging folder, renamed when whole; an earlier export of the name is replaced."""
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write(staging)
        umask = os.umask(0)
        os.umask(umask)
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors writes 0600
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _pad_id(job: Job) -> int | None:
    """The pad id of the exported config.

    transformers pools a reward at the last token that is not the pad token, so for a reward model the pad id must
    be one that no row ends with: with pad == eos, a plain row's reward would be read one token early.
    """
    pad = job.loaded.model.config.pad_token_id
    if pad is None and job.loaded.tokenizer is not None:
        pad = job.loaded.tokenizer.pad_token_id
    if job.data.objective.head != "scalar":
        return pad
    index = job.data.train.index
    ends = set(index.tokens[index.seq_ptr[1:] - 1].tolist())
    candidates = [pad] if pad is not None else []
    if job.loaded.tokenizer is not None:
        ends.add(job.loaded.tokenizer.eos_token_id)  # other rows than these may end with it
        candidates += sorted(job.loaded.tokenizer.all_special_ids)
    candidates += list(range(job.loaded.model.config.vocab_size))
    return next(token for token in candidates if token not in ends)


def _card(job: Job) -> str:
    config, objective = job.config, job.data.objective
    kind = "reward model" if objective.head == "scalar" else "language model"
    settings = {k: v for k, v in vars(config.objective).items() if k != "name"}
    return (
        f"---\nlibrary_name: transformers\ntags: [alignlab, {objective.name}]\n---\n\n"
        f"# {objective.name} of {Path(config.model.name_or_path).name}\n\n"
        f"A {kind} trained with alignlab {__version__}.\n\n"
        f"- base: `{config.model.name_or_path}`\n- data: `{config.data.path or 'a mixture'}`, "
        f"{job.data.train.manifest['kept']} rows\n- objective: `{json.dumps(settings, default=str)}`\n"
        f"- optimizer: {config.optim.name}, learning rate {config.optim.learning_rate:g}, "
        f"{config.train.global_batch_size} examples a step, {job.plans.total_steps} steps, seed {config.seed}\n"
    )
