"""The parts of ``gpu_check.py``: ``python scripts/gpu_parts.py PART ORDER.json RESULT.json`` runs one."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_side
import gpu_rows
from gpu_rows import SEED

BATCH, STEPS, WARM = 16, 6, 2
PARITY_SHAPE = gpu_rows.SHAPE | {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 2048,
}  # fmt: skip
FP32_TOLERANCE = 1e-4
"""Values and gradients in float32, relative to their norm: sums in another order."""
BF16_FACTOR, BF16_SLACK = 2.0, 2e-3
"""In bfloat16 a path may be so many times as far from float32 as dense attention in bfloat16 is, and so much more."""


# ---------------------------------------------------------------------------------------------------------------
# Parity
# ---------------------------------------------------------------------------------------------------------------


def parity(order: dict[str, Any]) -> dict[str, Any]:
    """Every layout, dtype and form of attention against dense attention, one unshared sequence at a time."""
    from transformers import LlamaForCausalLM

    from alignlab.data.pack import batch_of, to_device
    from alignlab.models import kernel
    from alignlab.models.proof import sequences
    from alignlab.models.scorer import Scorer

    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(order["device"])
    rows = sequences(PARITY_SHAPE["vocab_size"], scale=8 if order["toy"] else 48)
    torch.manual_seed(SEED)
    exact = (
        LlamaForCausalLM(gpu_rows.config(PARITY_SHAPE)).to(device, torch.bfloat16).float()
    )  # weights that bfloat16 holds
    exact.config.use_cache = False

    def fresh(dtype: torch.dtype, attention: str = "eager") -> Any:
        model = LlamaForCausalLM(gpu_rows.config(PARITY_SHAPE | {"attn_implementation": attention})).to(device, dtype)
        model.load_state_dict(exact.state_dict())
        model.config.use_cache = False
        return model

    def dense(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = fresh(dtype)
        return measured(model, torch.cat([dense_logps(model, row, device) for row in rows]))

    expected = dense(torch.float32)
    comparisons = []
    for dtype in (torch.float32, torch.bfloat16):
        word = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        limits = (FP32_TOLERANCE, FP32_TOLERANCE)
        if dtype == torch.bfloat16:
            limits = tuple(BF16_FACTOR * apart + BF16_SLACK for apart in gaps(dense(dtype), expected))  # type: ignore[assignment]
        for layout in ("tree", "packed", "rows"):
            forms = {"groups": "padded"} if layout != "rows" else {"sdpa": "padded"}
            takes, why = kernel.takes_ragged(fresh(dtype), layout, dtype, device)
            if takes:
                forms[why] = "ragged"
            for name, form in forms.items():
                model = fresh(dtype, "sdpa")
                batch = to_device(batch_of(rows, layout, form=form), device)
                logps = Scorer(model, "lm", layout)(batch).logps
                assert logps is not None
                values, gradients = gaps(measured(model, logps[batch.seq_idx]), expected)
                comparisons.append(
                    {
                        "name": f"{word} {layout}, {name}", "values": values, "gradients": gradients,
                        "allowed_values": limits[0], "allowed_gradients": limits[1],
                    }
                )  # fmt: skip
    wrong = [c["name"] for c in comparisons if not within_limits(c)]
    if wrong:
        raise SystemExit(f"parity: {', '.join(wrong)} are further from dense attention than allowed: {comparisons}")
    return {"comparisons": comparisons}


def within_limits(comparison: dict[str, Any]) -> bool:
    return all(comparison[what] <= comparison[f"allowed_{what}"] for what in ("values", "gradients"))


def dense_logps(model: Any, row: Any, device: torch.device) -> Tensor:
    """Log-probability of every target of one sequence, by the model's own forward, all logits at once."""
    ids = torch.from_numpy(row.tokens.astype(np.int64)).to(device)
    places = torch.from_numpy(np.flatnonzero(row.target)).to(device)
    return model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[places - 1, ids[places]]


def measured(model: Any, logps: Tensor) -> tuple[Tensor, Tensor]:
    """(values, the gradient of a sum with unlike weights), float64 on the host."""
    weights = torch.linspace(-1.0, 1.0, logps.numel(), device=logps.device)
    gradients = torch.autograd.grad((logps.float() * weights).sum(), list(model.parameters()))
    return logps.detach().double().cpu(), torch.cat([g.double().cpu().flatten() for g in gradients])


def gaps(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Differences of values and of gradients, relative to the norm of what was expected."""
    values, gradients = (((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
    return values, gradients


# ---------------------------------------------------------------------------------------------------------------
# Speed and memory
# ---------------------------------------------------------------------------------------------------------------


def job_order(order: dict[str, Any], objective: str, steps: int) -> dict[str, Any]:
    toy = order["toy"]
    return {
        "model": order["model"], "objective": objective, "dtype": "fp32" if order["device"] == "cpu" else "bf16",
        "max_length": gpu_rows.MAX_LENGTH, "seed": SEED, "batch": 2 if toy else BATCH, "micro_batch": None,
        "learning_rate": 1e-6, "options": order.get("settings", {}), "steps": steps,
    }  # fmt: skip


def steps(order: dict[str, Any]) -> dict[str, Any]:
    """Some optimizer steps as a run takes them; the first ones are warm-up."""
    from alignlab.models.flops import peak_rate

    warm, count = (1, 2) if order["toy"] else (WARM, STEPS)
    job, reference_seconds = bench_side.job_of(
        job_order(order, order["objective"], warm + count), Path(order["rows"]), warm + count
    )
    before = bench_side.reset_peak()
    seen: list[tuple[float, int, float]] = []

    class Hooks:
        def after_step(self, report: Any) -> bool:
            seen.append((report.seconds, report.plan.num_tokens, report.flops))
            return False

    bench_side.train(job, Hooks())
    found = figures(seen[warm:], peak_rate(job.engine.device, job.loaded.dtype))
    found |= {
        "peak_gib": bench_side.peak() / 1024, "held_before_gib": before / 1024, "attention": job.layout_line,
        "reference_seconds": reference_seconds, "settings": order.get("settings", {}),
    }  # fmt: skip
    job.engine.close()
    del job
    if order["device"] == "cuda":
        torch.cuda.empty_cache()
    rate = bench_side.matmul_side({"dtype": "fp32" if order["device"] == "cpu" else "bf16"})["flops_per_second"]
    return found | {"matmul_flops_per_second": rate, "matmul_share": found["flops_per_second"] / rate}


def figures(seen: list[tuple[float, int, float]], peak: float | None) -> dict[str, Any]:
    """Of measured steps (seconds, tokens, floating point operations): the rates over all of them."""
    seconds, tokens, flops = (sum(column) for column in zip(*seen, strict=True))
    found = {
        "steps": len(seen), "seconds_a_step": statistics.median(step[0] for step in seen),
        "tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds,
    }  # fmt: skip
    return found if peak is None else found | {"mfu": flops / seconds / peak}


def longest(order: dict[str, Any]) -> dict[str, Any]:
    """The longest single sequence that a step trains on, activations recomputed: doubled until memory runs out."""
    from alignlab.data.pack import batch_of, to_device
    from alignlab.types import EncodedSequence
    from alignlab.worker import out_of_memory

    settings = {"train.gradient_checkpointing": True}
    job, _ = bench_side.job_of(job_order(order | {"settings": settings}, "sft", 1), Path(order["rows"]), 1)
    form = job.loader.form
    rng = np.random.Generator(np.random.Philox(key=SEED))
    vocabulary = job.scorer.inner.config.vocab_size

    def train(length: int) -> None:
        tokens = rng.integers(0, vocabulary, length).astype(np.int32)
        rows = [EncodedSequence(tokens, np.arange(length) >= length // 2)]
        batch = to_device(batch_of(rows, job.scorer.layout, form=form), job.engine.device)
        logps = job.engine.score(batch, bench_ask()).logps
        job.engine.backward(-logps.sum() / logps.numel(), last=True)
        job.engine.step(1e-6)

    most = 256 if order["toy"] else gpu_rows.SHAPE["max_position_embeddings"]
    fits, peaks, stopped = doubled(train, 64 if order["toy"] else 4096, most, out_of_memory)
    return {"longest": fits, "peak_gib": peaks, "stopped": stopped, "attention": job.layout_line}


def bench_ask() -> Any:
    from alignlab.types import Ask

    return Ask("logps")


def doubled(
    train: Callable[[int], None], first: int, most: int, out_of_memory: Callable[[BaseException], bool]
) -> tuple[int, float, str]:
    """(the longest length that could be trained on, peak GiB there, why it went no further)."""
    fits, peak = 0, 0.0
    for length in lengths_from(first, most):
        bench_side.reset_peak()
        try:
            train(length)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return fits, peak, f"out of memory at {length:,}"
        fits, peak = length, bench_side.peak() / 1024
    return fits, peak, f"the model has {most:,} positions"


def lengths_from(first: int, most: int) -> Iterator[int]:
    """first, twice that, ... up to ``most``."""
    while first <= most:
        yield first
        first *= 2


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"parity": parity, "steps": steps, "longest": longest}


def main() -> None:
    part, order, target = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    target.write_text(json.dumps(PARTS[part](order), default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
