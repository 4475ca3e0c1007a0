"""One side of a benchmark, in a process of its own: ``python scripts/bench_side.py ORDER.json`` prints one JSON line.

``bench.py`` starts it.  A warm-up (one small step, everything imported and loaded once) comes before the clocks.  The
clock ``whole`` runs from row file and model folder to the last optimizer step, so it holds tokenisation, loading, the
constructor and the reference pass; the clock ``train`` runs over the optimizer steps.  What is only needed for the
comparison (ids, counts) is taken when the clocks stand.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Sides = list[tuple[list[int], list[bool]]]
"""One example: (token ids, which of them are targets) of its one or two sequences."""

RATE_SECONDS = 2.0
"""How long the matrix product rate is measured."""


# ---------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds since it was made: ``wall``, and ``cpu`` of this process and its children, finished or not."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._wall, self._cpu = time.perf_counter(), self._processor()

    def _processor(self) -> float:
        import psutil

        total = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                total += sum(process.cpu_times()[:4])  # user, system, and those of its own finished children
            except psutil.NoSuchProcess:
                continue
        return total

    def read(self) -> dict[str, float]:
        """Seconds so far, of work that is done."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"wall": time.perf_counter() - self._wall, "cpu": self._processor() - self._cpu}


def reset_peak() -> float:
    """Forget the highest memory so far; MiB held now."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed goes back, or it would count as ours
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> float:
    """Highest memory since :func:`reset_peak` in MiB: allocated on the GPU where there is one, else resident."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _resident("VmHWM")


def _resident(name: str) -> float:
    if sys.platform != "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def matmul_side(order: dict[str, Any]) -> dict[str, Any]:
    """The machine's rate at a large matrix product, in the dtype and with the threads of the runs: its best."""
    import torch

    gpu = torch.cuda.is_available()
    size, device = (8192, "cuda") if gpu else (2048, "cpu")
    a, b = (torch.randn(size, size, device=device).to(torch_dtype(order["dtype"])) for _ in range(2))
    best, ends = 0.0, time.perf_counter() + RATE_SECONDS
    while time.perf_counter() < ends or not best:
        clock = Clock()
        a @ b
        best = max(best, 2 * size**3 / clock.read()["wall"])
    return {"flops_per_second": best, "size": size}


def torch_dtype(name: str) -> Any:
    """``fp32`` | ``bf16``"""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def of_steps(examples: Iterator[list[Sides]]) -> dict[str, Any]:
    """What the steps held: a hash each (the same for the same examples in any order), one of all, and counts."""
    steps, everything, targets, sequences, lengths = [], [], 0, 0, []
    for step in examples:
        hashed = [hashlib.sha256(json.dumps(example).encode()).hexdigest() for example in step]
        steps.append(_hash_of(hashed))
        everything += hashed
        for ids, target in (side for example in step for side in example):
            targets, sequences = targets + sum(target), sequences + 1
            lengths.append(len(ids))
    counts = {"supervised_tokens": targets, "sequences": sequences, "lengths": lengths}
    return {"steps": steps, "all": _hash_of(everything), **counts}


def _hash_of(hashes: list[str]) -> str:
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# alignlab
# ---------------------------------------------------------------------------------------------------------------


def job_of(order: dict[str, Any], rows: Path, steps: int) -> tuple[Any, float]:
    """(the job that a run's worker would train, the seconds that its reference pass took)."""
    from alignlab import dist
    from alignlab.configuration.compose import compose
    from alignlab.runs.job import assemble, attach_reference, prepare_data

    settings = {
        "model": order["model"], "data": str(rows), "objective": order["objective"], "engine": "local",
        "model.dtype": order["dtype"], "data.max_length": str(order["max_length"]), "seed": order["seed"],
        "train.global_batch_size": order["batch"], "train.max_steps": steps,
        "train.per_device_train_batch_size": order["micro_batch"], "optim.learning_rate": order["learning_rate"],
        "optim.lr_scheduler_type": "constant", "optim.warmup_steps": 0, **order["options"],
    }  # fmt: skip
    config = compose(values=settings).config
    data = prepare_data(config)
    dist.init(timeout=config.engine.timeout, group=False)
    job = assemble(config, data)
    return job, attach_reference(job)


def train(job: Any, hooks: Any) -> None:
    """The steps of a job, as a run's worker takes them."""
    from alignlab.data.loader import Ahead
    from alignlab.models.flops import ModelFlops
    from alignlab.train.loop import Progress, fit
    from alignlab.train.step import passes

    config, objective = job.config, job.data.objective
    with Ahead(job.plans, job.loader, passes(objective)) as plans:
        fit(
            job.engine, objective, plans, job.loader, config.optim, config.train, config.seed, Progress(), hooks,
            flops=ModelFlops.of(job.scorer.model),
        )  # fmt: skip


def alignlab_side(order: dict[str, Any], rows: Path, steps: int, clock: Clock) -> dict[str, Any]:
    """The training code as a run's worker calls it, without a run folder."""
    job, reference_seconds = job_of(order, rows, steps)
    found: dict[str, Any] = {"reference_seconds": reference_seconds, "layout": job.scorer.layout}
    if order["prepare_only"]:
        return found
    losses: list[float] = []
    flops = 0.0

    class Hooks:
        def after_step(self, report: Any) -> bool:
            nonlocal flops
            losses.append(report.metrics["loss"])
            flops += report.flops
            return False

    training = Clock()
    train(job, Hooks())
    found |= {"train": training.read(), "whole": clock.read(), "peak_mib": peak(), "losses": losses, "flops": flops}
    job.engine.close()
    supervised = job.data.objective.head == "lm"
    return found | of_steps(our_examples(job.plans, step, supervised) for step in range(steps))


def our_examples(plans: Any, step: int, supervised: bool) -> list[Sides]:
    """The examples of a step with their token ids, one or two sequences each."""
    from alignlab.types import Unit

    index = plans.index
    found = []
    for example, sample in zip(*plans.examples(step), strict=True):
        if plans.unit is Unit.PAIR:
            numbers = [int(index.sample_ptr[sample]) + int(side) for side in index.pairs[example]]
        else:
            numbers = [int(example)]
        pairs = [index.sequence(number) for number in numbers]
        found.append([(one.tokens.tolist(), (one.target & supervised).tolist()) for one in pairs])
    return found


# ---------------------------------------------------------------------------------------------------------------
# TRL
# ---------------------------------------------------------------------------------------------------------------


def trl_side(order: dict[str, Any], rows: Path, steps: int, clock: Clock) -> dict[str, Any]:
    """TRL's trainer on the same rows in the same order; ``order["trl"]`` are the settings that a user may choose."""
    import torch
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer

    gpu, micro = torch.cuda.is_available(), order["micro_batch"]
    objective = {"dpo": "DPO", "reward": "Reward", "sft": "SFT"}[order["objective"]]
    config = getattr(trl, f"{objective}Config")(
        output_dir=order["scratch"], per_device_train_batch_size=micro, max_steps=steps,
        gradient_accumulation_steps=order["accumulate"], learning_rate=order["learning_rate"],
        lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, max_length=order["max_length"],
        seed=order["seed"], train_sampling_strategy="sequential", use_cpu=not gpu, bf16=order["dtype"] == "bf16",
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, **order["trl"],
    )  # fmt: skip
    data = load_dataset("json", data_files=str(rows), split="train")
    tokenizer = AutoTokenizer.from_pretrained(order["model"], trust_remote_code=False)
    kind = getattr(trl, f"{objective}Trainer")
    trainer = kind(model=order["model"], args=config, train_dataset=data, processing_class=tokenizer)
    if order["prepare_only"]:
        return {"rows": len(trainer.train_dataset)}
    training = Clock()
    trainer.train()
    found = {"train": training.read(), "whole": clock.read(), "peak_mib": peak()}
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    data, batch = list(trainer.train_dataset), micro * order["accumulate"]
    held = of_steps(
        [example for row in data[step * batch : (step + 1) * batch] for example in trl_examples(row, objective)]
        for step in range(steps)
    )
    return found | held | {"flops": trl_flops(trainer, held, objective)}


def trl_examples(row: dict[str, Any], objective: str) -> list[Sides]:
    """What stands in a row of a trainer's own data set, as :func:`our_examples` has it: one example, packed or more."""
    if objective == "SFT":
        ids, target, found = row["input_ids"], [label != -100 for label in row["labels"]], []
        for length in row.get("seq_lengths") or [len(ids)]:
            found.append([(ids[:length], target[:length])])
            ids, target = ids[length:], target[length:]
        return found
    if objective == "Reward":
        return [[(ids, [False] * len(ids)) for ids in (row["chosen_ids"], row["rejected_ids"])]]
    prompt = row["prompt_ids"]
    answers = (row["chosen_ids"], row["rejected_ids"])
    return [[(prompt + ids, [False] * len(prompt) + [True] * len(ids)) for ids in answers]]


def trl_flops(trainer: Any, held: dict[str, Any], objective: str) -> float:
    """The model's work in the steps, without padding; a reference that is run in the steps is work, too."""
    from alignlab.models.flops import ModelFlops

    flops = ModelFlops.of(trainer.model)
    scored = held["sequences"] if objective == "Reward" else held["supervised_tokens"]
    work = flops.of_lengths(held["lengths"], scored, backward=True)
    if getattr(trainer, "ref_model", None) is not None:
        work += flops.of_lengths(held["lengths"], scored, backward=False)
    return work


SIDES = {"alignlab": alignlab_side, "trl": trl_side}


def main() -> None:
    """Warm up, measure, print."""
    order = json.loads(Path(sys.argv[1]).read_text())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries talk; standard output is ours
    import torch

    if order["threads"]:
        torch.set_num_threads(order["threads"])
    if order["side"] == "matmul":
        found = matmul_side(order)
    else:
        side = SIDES[order["side"]]
        side(order, Path(order["warm_rows"]), 1, Clock())
        before = reset_peak()
        found = side(order, Path(order["rows"]), order["steps"], Clock())
        found |= {"before_mib": before, "threads": torch.get_num_threads()}
        if "lengths" in found:
            found["tokens"] = sum(found.pop("lengths"))
    out.write(json.dumps(found) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
