"""Whole training runs in one process or on each rank of one launch; returns their curves, the tests judge them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from alignlab import worker
from alignlab.configuration.compose import compose
from alignlab.data import world
from alignlab.engine import deepspeed
from alignlab.errors import Preempted
from alignlab.models import tiny
from alignlab.runfolder import RunFolder
from alignlab.worker import StopFlag

STEPS = 20
HALF = 9
"""Where broken runs stop: no multiple of anything."""
REPEATED = "repeated prompts"


class StopAfter(StopFlag):
    """Asks for a stop at the end of step ``steps``; the loop looks once a step."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self._steps, self._asked = steps, 0

    def __call__(self) -> bool:
        self._asked += 1
        return self._asked == self._steps


def make_model(folder: Path) -> None:
    """A small Llama with tied embeddings and the tokenizer of ``tiny``, as a plain Hugging Face folder."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = tiny.tokenizer()
    config = tiny.config(len(tokenizer))
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 48, 96, 4, 2
    config.head_dim = 12
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_repeated_rows(path: Path) -> None:
    """Pairs in which each prompt comes three times, with other rejected answers: what merging can merge."""
    lines = []
    for row in world.rows("pairs", 12):
        for ending in ("", " Or so.", " I guess."):
            text = row["rejected"][0]["content"] + ending
            lines.append(json.dumps({**row, "rejected": [{"role": "assistant", "content": text}]}))
    path.write_text("\n".join(lines) + "\n")


def run(root: Path, name: str, cell: dict[str, Any]) -> dict[str, Any]:
    """One training run through the worker.

    ``words``: settings.  ``stop``: ask for a stop after so many steps.  ``goes_on``: the broken run whose checkpoint is
    taken over, the name of an earlier cell or a folder.
    """
    folder = RunFolder(root / name)
    if worker.dist.is_main():
        folder.logs.mkdir(parents=True, exist_ok=True)
        if "goes_on" in cell:
            shutil.copytree(root / cell["goes_on"] / "checkpoints", folder.checkpoints)
    data = str(root.parent / "rows.jsonl") if cell.get("rows") == REPEATED else "sums"
    words = [
        f"model={root.parent / 'model'}", f"data={data}", "data.eval_path=sums", "optim.learning_rate=2e-3",
        "data.options={rows: 40, eval_rows: 4}", f"train.max_steps={STEPS}", "train.global_batch_size=6",
    ]  # fmt: skip
    config = compose([*words, *cell["words"]], needs=("model", "data", "objective")).config
    jobs: list[Any] = []

    def kept(*arguments: Any) -> Any:
        jobs.append(assemble(*arguments))
        return jobs[0]

    assemble, worker.assemble = worker.assemble, kept
    if worker.dist.world_size() > 1:
        worker.dist.init(group=True)
        worker.dist.barrier()
    try:
        with contextlib.suppress(Preempted):
            worker.run(config, folder, StopAfter(cell.get("stop")), io.StringIO())
    finally:
        worker.assemble = assemble
    job = jobs[0]
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return {
        "loss": [r["loss"] for r in records if "loss" in r],
        "grad_norm": [r["grad_norm"] for r in records if "loss" in r],
        "held_out": [r["eval_loss"] for r in records if "eval_loss" in r],
        "engine": job.engine.name,
        "layout": job.scorer.layout,
        "batches": len(job.plans.at(0).bins),
        "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in job.scorer.modules()),
        "trained": sum(p.requires_grad for p in job.scorer.parameters()),
        "tokens": sum(batch.input_ids.numel() for batch in job.loader.of(job.plans.at(0))),
    }


def everything(folder: str, cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All cells of this world size, in order."""
    deepspeed.PERSISTENCE = 0  # ZeRO-3 keeps small parameters whole, and here all are small
    return {name: run(Path(folder), name, cell) for name, cell in cells.items()}
