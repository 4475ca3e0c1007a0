"""The policy as a language model over cells, and its training by the project's own objectives and loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignlab.configuration.compose import compose
from alignlab.models.scorer import select_attention
from alignlab.runs.job import assemble, attach_reference, prepare_data
from alignlab.train.loop import Progress, StepReport, fit

HIDDEN, INNER, INIT_STD = 32, 64, 0.1
"""Width of a cell's embedding, width of the inner layer, deviation of the first weights."""
FIT = {
    "objective": "sft", "train.max_steps": 40, "optim": "adamw", "optim.learning_rate": 1e-2, "optim.beta2": 0.99,
}  # fmt: skip
"""How a matrix is fitted.  Neither the start policy nor the target is what is compared, so both may be fitted well."""

Row = dict[str, Any]


def new_policy(cells: int, seed: int) -> Any:
    """One block of a Mistral whose window is 1: an embedding of the cell, a gated two-layer net, an output layer.

    With a window of 1 a token attends to itself alone, so what comes next depends on the cell and not on the way there.
    """
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=cells, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=HIDDEN, max_position_embeddings=64, sliding_window=1, tie_word_embeddings=False,
        initializer_range=INIT_STD, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MistralForCausalLM(config)


@torch.no_grad()
def matrix_of(model: Any) -> np.ndarray:
    """float64 [cells, cells]: the probability of each next cell, for each cell."""
    select_attention(model, "sdpa")  # the trainer's own attention takes packed batches; it is selected again by them
    cells = torch.arange(model.config.vocab_size, device=model.device)[:, None]
    return model(input_ids=cells).logits[:, -1].double().softmax(-1).cpu().numpy()


def transitions(matrix: np.ndarray, cells: np.ndarray) -> list[Row]:
    """Rows that teach a matrix in the chosen ``cells`` [cells]: every possible move, weighted by its probability."""
    places = np.argwhere((matrix > 0) & cells[:, None])
    return [{"input_ids": [int(s), int(t)], "prompt_length": 1, "weight": float(matrix[s, t])} for s, t in places]


class Training:
    """One objective on one set of rows, composed and prepared once, for any number of start policies.

    ``settings`` are keys of ``alignlab train``.
    """

    def __init__(self, folder: Path, name: str, rows: Sequence[Row], settings: Mapping[str, Any], start: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        common = {
            "model": str(start), "data": str(path), "data.num_proc": 1, "engine": "local",
            "train.global_batch_size": len(rows),
        }  # fmt: skip
        self.config = compose(values={**common, **settings}, needs=("model", "data", "objective")).config
        self.data = prepare_data(self.config)

    def run(self, start: Path, seed: int, every: int | None = None) -> tuple[Any, np.ndarray]:
        """(trained model, matrices [n, cells, cells] after every so many steps, or of the end alone)."""
        model = dataclasses.replace(self.config.model, name_or_path=str(start))
        config = dataclasses.replace(self.config, model=model, seed=seed)
        job = assemble(config, self.data)
        attach_reference(job)
        watched = _Watched(job.loaded.model, every or job.plans.total_steps)
        try:
            fit(
                job.engine, self.data.objective, job.plans, job.loader, config.optim, config.train, seed, Progress(),
                watched,
            )  # fmt: skip
        finally:
            job.engine.close()
        return job.loaded.model, np.stack(watched.matrices)


class _Watched:
    """Hooks of the loop that keep the policy's matrix."""

    def __init__(self, model: Any, every: int) -> None:
        self.model, self.every = model, every
        self.matrices: list[np.ndarray] = []

    def after_step(self, report: StepReport) -> bool:
        if report.progress.step % self.every == 0:
            self.matrices.append(matrix_of(self.model))
        return False


def save(model: Any, folder: Path) -> Path:
    """Write a policy as a model folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder
