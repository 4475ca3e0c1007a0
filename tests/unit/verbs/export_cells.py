"""Short training runs whose exports are compared with the live model; called through ``spawn`` on every rank."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from alignlab import worker
from alignlab.configuration.compose import compose
from alignlab.engine import deepspeed
from alignlab.models import tiny
from alignlab.ops.segments import segment_sum
from alignlab.runfolder import RunFolder
from alignlab.runs.export import export_model
from alignlab.types import Ask

ENDS_WITH_EOS = (
    "{%- for m in messages %}{{ ('' if loop.first else '\n') + '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>' }}{% endfor %}{%- if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
"""As several families have it: nothing follows the terminator of the last turn."""


def make_model(folder: Path, *, tied: bool = True, pad_is_eos: bool = False) -> None:
    """A small Llama; with ``pad_is_eos`` its rows end with the very token that its tokenizer pads with."""
    from transformers import LlamaForCausalLM

    tokenizer = tiny.tokenizer()
    config = tiny.config(len(tokenizer))
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 48, 96, 4, 2
    config.head_dim, config.tie_word_embeddings = 12, tied
    if pad_is_eos:
        tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, ENDS_WITH_EOS
        config.pad_token_id = None
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def live_scores(job: Any) -> list[list[float]]:
    """[sequence, summed log-probability of its targets, or its reward] of this rank's held-out rows."""
    found = []
    job.engine.train(False)
    with torch.no_grad():
        for batch in job.held_loader.of(job.held_plans.at(0)):
            if job.data.objective.head == "scalar":
                values = job.engine.score(batch, Ask("reward")).rewards
            else:
                logps = job.engine.score(batch, Ask("logps")).logps
                values = segment_sum(logps[batch.seq_idx], batch.seq_of, batch.last.numel())
            found += torch.stack((batch.sequence_ids.double(), values.double()), 1).tolist() if batch.weight else []
    return found


def run(root: Path, name: str, words: list[str]) -> dict[str, Any]:
    """Two steps and an export; the live model's scores just before it, and the rows they belong to."""
    folder = RunFolder(root / name)
    if worker.dist.is_main():
        folder.logs.mkdir(parents=True)
    settings = [
        "data=sums", "optim.learning_rate=1e-2", "optim.warmup_ratio=0", "train.max_steps=2", "seed=1",
        "train.global_batch_size=4", "data.options={rows: 8, eval_rows: 6}",
    ]  # fmt: skip
    config = compose([*settings, *words], needs=("model", "data", "objective")).config
    out: dict[str, Any] = {}

    def recorded(job: Any, target: Path) -> None:
        index = job.data.held_out.index
        sequences = [s for i in range(len(index)) for s in index.sample(i).sequences]
        out["rows"] = [[s.tokens.tolist(), s.target.astype(int).tolist()] for s in sequences]
        out["live"] = live_scores(job)
        export_model(job, target)

    worker.export_model = recorded
    if worker.dist.world_size() > 1:
        worker.dist.init(group=True)
        worker.dist.barrier()
    try:
        worker.run(config, folder, worker.StopFlag(), io.StringIO())
    finally:
        worker.export_model = export_model
    return out


def everything(folder: str, cells: dict[str, list[str]]) -> dict[str, Any]:
    """All cells of this world size, in order."""
    deepspeed.PERSISTENCE = 0  # ZeRO-3 keeps small parameters whole, and here all are small
    return {name: run(Path(folder), name, words) for name, words in cells.items()}
