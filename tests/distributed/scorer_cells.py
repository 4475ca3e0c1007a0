"""The real scorer over a tiny Llama in every engine; called through ``spawn``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from alignlab import dist
from alignlab.config import EngineConfig, OptimConfig
from alignlab.data import pack
from alignlab.data.index import Index, IndexWriter
from alignlab.data.plan import StepPlans
from alignlab.engine import deepspeed
from alignlab.engine.base import Engine, make_engine
from alignlab.models.load import DTYPES
from alignlab.models.scorer import Scorer
from alignlab.types import Ask, EncodedSample, EncodedSequence, Mix, Unit

STEPS = 5
CELLS: dict[str, dict[str, Any]] = {
    "tree": {"layout": "tree"},
    "rows": {"layout": "rows", "tied": True},
    "checkpointed": {"layout": "tree", "checkpointing": True, "tied": True},
    "scalar": {"layout": "packed", "head": "scalar"},
    "lora": {"layout": "tree", "lora": True},
    "bf16": {"layout": "tree", "dtype": "bf16"},
}


def index(folder: Path) -> Index:
    """Ten samples of two sequences that share a prompt; rank 0 makes it."""
    if dist.is_main():
        rng = np.random.default_rng(0)
        with IndexWriter(folder) as writer:
            for number in range(10):
                prompt, made = rng.integers(0, 60, 6), []
                for length in rng.integers(2, 9, 2):
                    tokens = np.concatenate((prompt, rng.integers(0, 60, length))).astype(np.int32)
                    made.append(EncodedSequence(tokens, np.arange(len(tokens)) >= len(prompt)))
                ones = {"weight": np.ones(2)}
                pairs = np.array([[0, 1]], dtype=np.int32)
                writer.add(EncodedSample(f"row-{number}", "test", made, pairs, ones, {"weight": np.ones(1)}))
            writer.close()
    dist.barrier()
    return Index.open(folder)


def model(head: str, tied: bool, lora: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=41, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, num_labels=1, pad_token_id=60,
    )  # fmt: skip
    made = (LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification)(config)
    if lora:
        torch.manual_seed(1)
        made = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    return made


def step(engine: Engine, plans: StepPlans, number: int, layout: str, head: str) -> tuple[float, float]:
    plan = plans.at(number)
    loss_sum = torch.zeros(1, dtype=torch.float64)
    bins = plan.for_rank(engine.rank)
    for place, chosen in enumerate(bins):
        batch = pack.pack(plans.index, chosen, layout, pad_id=60)
        if head == "scalar":
            rewards = engine.score(batch, Ask("reward")).rewards
            assert rewards is not None
            difference = rewards[batch.pairs[:, 0]] - rewards[batch.pairs[:, 1]]
            loss = -torch.nn.functional.logsigmoid(difference).sum() / plan.totals[Unit.PAIR]
        else:
            with torch.no_grad():
                residual = engine.score(batch, Ask("greedy")).tokens
            assert residual is not None
            mixed = engine.score(batch, Ask("logps", Mix(residual, 0.2))).logps
            plain = engine.score(batch, Ask("logps")).logps
            assert mixed is not None
            assert plain is not None
            loss = -(mixed[batch.seq_idx].sum() + plain[batch.seq_idx].sum()) / 100
        loss = loss * batch.weight
        loss_sum += loss.detach().double()
        engine.backward(loss * engine.dp, last=place + 1 == len(bins))
    info = engine.step(1e-2)
    return engine.reduce(loss_sum).item(), info.grad_norm


def curves(folder: str, names: list[str]) -> dict[str, Any]:
    """Each engine in ``names``: the curve of every cell, and whether its export scores alike in plain torch."""
    deepspeed.PERSISTENCE = 0
    dist.init(timeout=60)
    rows = index(Path(folder) / f"index-{dist.world_size()}")
    out: dict[str, Any] = {}
    for name in names:
        for key, cell in CELLS.items():
            dtype = cell.get("dtype", "fp32")
            if name == "zero0" and dtype == "bf16":
                continue
            head, layout = cell.get("head", "lm"), cell["layout"]
            arguments = (head, cell.get("tied", False), cell.get("lora", False))
            checkpointing = cell.get("checkpointing", False)
            engine = make_engine(
                name, Scorer(model(*arguments), head, layout), OptimConfig(), EngineConfig(name, timeout=60),
                DTYPES[dtype], checkpointing,
            )  # fmt: skip
            engine.train()
            plans = StepPlans(
                rows, unit=Unit.PAIR, global_batch_size=4, seed=0, max_steps=STEPS, token_budget=40, dp=engine.dp,
                layout=layout,
            )  # fmt: skip
            curve = [step(engine, plans, number, layout, head) for number in range(STEPS)]
            engine.train(False)
            batch = pack.pack(rows, plans.at(0).bins[0], layout, pad_id=60)
            with torch.no_grad():
                scores = engine.score(batch, Ask("reward" if head == "scalar" else "logps"))
            state, same = engine.full_state_dict(), None
            if engine.rank == 0:
                twin = Scorer(model(*arguments), head, layout)
                if dtype == "bf16":
                    for p in twin.parameters():
                        p.data = p.data.bfloat16()
                missing, unexpected = twin.load_state_dict(state, strict=False)
                with torch.no_grad():
                    again = twin.eval()(batch, Ask("reward" if head == "scalar" else "logps"))
                pair = (scores.rewards, again.rewards) if head == "scalar" else (scores.logps, again.logps)
                same = not missing and not unexpected and bool(torch.equal(*pair))
            out[f"{name}/{key}"] = {"curve": curve, "same": same}
            engine.close()
    return out
