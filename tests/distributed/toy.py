"""A small scorer with the call form of the real one, and a training step of ragged micro-batches.

Parameter sizes are odd on purpose: ZeRO pads its partitions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignlab import dist
from alignlab.config import EngineConfig, OptimConfig
from alignlab.engine import deepspeed
from alignlab.engine.base import Engine, make_engine
from alignlab.models.load import DTYPES
from alignlab.types import Ask, PackedBatch, Scores

VOCABULARY, WIDTH = 37, 19


class Head(nn.Linear):
    def forward(self, hidden: Tensor, targets: Tensor) -> Scores:  # type: ignore[override]
        return Scores(logps=torch.log_softmax(super().forward(hidden).float(), -1)[torch.arange(len(targets)), targets])


class Toy(nn.Module):
    """Next-token scores from an embedding, a residual layer and a head; ``unused`` never gets a gradient."""

    def __init__(self, seed: int = 0, adapter: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = Head(WIDTH, VOCABULARY, bias=False)
        self.unused = nn.Linear(3, 5)
        self.register_buffer("scale", torch.tensor(1.3))  # bfloat16 would make it 1.296875
        self.down = nn.Linear(WIDTH, 4, bias=False) if adapter else None
        self.up = nn.Linear(4, WIDTH, bias=False) if adapter else None
        if adapter:
            self.requires_grad_(False)
            self.down.requires_grad_(True)  # type: ignore[union-attr]
            self.up.requires_grad_(True)  # type: ignore[union-attr]

    def forward(self, batch: PackedBatch, ask: Ask) -> Scores:
        hidden = self.embed(batch.input_ids[0])
        update = self.layer(torch.tanh(hidden))
        if self.down is not None and self.up is not None:
            update = update + self.up(self.down(hidden))
        hidden = (self.norm(hidden + update).float() * self.scale).to(hidden.dtype)
        return self.head(hidden[batch.scored], batch.targets)


def micro_batch(step: int, number: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(1000 * step + number)
    length = 5 + (3 * number + step) % 7
    ids = torch.randint(VOCABULARY, (1, length), generator=generator)
    empty = torch.zeros(0, dtype=torch.int64)
    fields: dict[str, Any] = dict.fromkeys(PackedBatch._fields, empty)
    fields |= {"input_ids": ids, "scored": torch.arange(length - 1), "targets": ids[0, 1:]}
    fields |= {"attention_mask": None, "plan": None, "sequence_values": {}, "pair_values": {}, "weight": 1.0}
    return PackedBatch(**fields)


def micro_batches(step: int, dp: int = 1, rank: int = 0) -> list[PackedBatch]:
    """A different number every step, dealt to the ranks; a multiple of any ``dp`` up to 4."""
    count = 4 * (1 + step % 2)
    return [micro_batch(step, number) for number in range(rank, count, dp)]


def accumulate(engine: Engine, step: int, poison: bool = False) -> Tensor:
    """All backward passes of one optimizer step; this rank's part of the loss, float64 [1]."""
    total = sum(len(b.targets) for b in micro_batches(step))
    batches = micro_batches(step, engine.dp, engine.rank)
    loss_sum = torch.zeros(1, dtype=torch.float64)
    for number, batch in enumerate(batches):
        if number == 0:
            with torch.no_grad():  # a pass of its own, as IFT's greedy one
                engine.score(batch, Ask("greedy"))
        logps = engine.score(batch, Ask()).logps
        assert logps is not None
        loss = -logps.sum() / total
        if poison and engine.rank == engine.dp - 1 and number == 0:
            loss = loss * math.nan
        loss_sum += loss.detach().double().cpu()
        engine.backward(loss * engine.dp, last=number + 1 == len(batches))
    return loss_sum


def train_step(engine: Engine, step: int, poison: bool = False) -> tuple[float, float]:
    """One optimizer step; the loss before it, and the gradient norm."""
    loss_sum = accumulate(engine, step, poison)
    info = engine.step(lr=0.01 * (1 + step % 3))
    assert info.updated is not poison
    return engine.reduce(loss_sum).item(), info.grad_norm


def make(engine: str, /, dtype: str = "fp32", seed: int = 0, adapter: bool = False, **options: Any) -> Engine:
    deepspeed.PERSISTENCE = 0
    engine_options = {key: options.pop(key) for key in ("offload_optimizer",) if key in options}
    optim = OptimConfig(**{"max_grad_norm": 0.5, "weight_decay": 0.1, **options})
    return make_engine(
        engine, Toy(seed, adapter), optim, EngineConfig(engine, timeout=60, **engine_options), DTYPES[dtype]
    )


def state_bits(engine: Engine, folder: Path) -> dict[str, str]:
    """A digest of every trained parameter and of its optimizer state, complete, as saved."""
    import hashlib

    from alignlab.engine import shards

    if dist.is_main():
        folder.mkdir(parents=True)
    dist.barrier()
    engine.save(folder)
    dist.barrier()
    bits = {}
    with shards.ShardReader(folder) as reader:
        for name in sorted(reader.names()):
            for kind in sorted({shards.PARAMETER, *reader.kinds(name)}):
                bits[f"{name}/{kind}"] = hashlib.sha256(reader.whole(kind, name).numpy().tobytes()).hexdigest()
    dist.barrier()
    return bits
