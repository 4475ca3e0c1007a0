"""Where a step's time goes, by part of the model and of the step.

    python scripts/profile_step.py --objective dpo --model smollm2 --layers 6 --data hh.jsonl.gz

Trains as a run does: a few steps to warm up, then some under torch's profiler.  Scopes are put around the modules from
here; what runs in the backward pass is assigned to the part whose forward it belongs to, by autograd's sequence
numbers.  Printed for each part: milliseconds a step forward and backward, its share of the step, and the rate of its
matrix products (GFLOP/s; attention: of the keys that are visible).  Times are of the training thread on a CPU, of the
kernels on a GPU.  ``between`` is time in no operation: Python, and waiting.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench
import bench_cases
import bench_side

SCOPE = "part: "
BACKWARD = "autograd::engine::evaluate_function: "
ATTENTION, OPTIMIZER = "attention itself, rotary", "optimizer"
CLIP, UNCLAIMED = "gradient norm, clipping", "loss and the rest"


def part_of(name: str, module: nn.Module, model: Any) -> str | None:
    """The part that a module belongs to; None for one that only holds others."""
    words = name.lower().split(".")
    inside_attention = any("attn" in word or "attention" in word for word in words)
    if module is model.get_input_embeddings():
        return "embedding"
    if module in (model.get_output_embeddings(), getattr(model, "score", None)):
        return "output layer"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if "rotary" in type(module).__name__.lower():
        return "rotary angles"
    if isinstance(module, nn.Linear):
        return "attention matrices" if inside_attention else "MLP matrices"
    if "attn" in words[-1] or "attention" in words[-1]:
        return ATTENTION
    return "MLP activation" if words[-1] == "mlp" else None


@contextmanager
def scopes(model: Any) -> Iterator[None]:
    """Record every part's forward under its name, while the block runs."""
    open_scopes: list[Any] = []

    def enter(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            scope = record_function(SCOPE + part)
            scope.__enter__()
            open_scopes.append(scope)

        return hook

    def leave(*_: Any) -> None:
        open_scopes.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if part := part_of(name, module, model):
                hooks.callback(module.register_forward_pre_hook(enter(part)).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        yield


def scoped(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` in a scope."""

    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(SCOPE + part):
            return function(*arguments, **options)

    return call


@dataclass
class Time:
    """Of one part: microseconds forward and backward, operations that the profiler counts."""

    forward: float = 0.0
    backward: float = 0.0
    flops: float = 0.0


@dataclass
class Steps:
    """Hooks of the loop: the profiler runs from the end of step ``warm`` to the last."""

    profiler: Any
    warm: int
    seconds: float = 0.0
    flops: float = 0.0
    count: int = 0
    clock: Any = field(default=None)

    def after_step(self, report: Any) -> bool:
        if report.progress.step == self.warm:
            self.profiler.start()
            self.clock = bench_side.Clock()
        elif report.progress.step > self.warm:
            self.flops += report.flops
            self.count += 1
            self.seconds = self.clock.read()["wall"]
        return False


def by_part(events: Iterable[Any], gpu: bool) -> dict[str, Time]:
    """The operations' own times summed by part.

    An operation belongs to the nearest scope around it; one of the backward pass to the part in which the forward
    operation of the same sequence number stood.  Threads that only pack data are left out, and so are the entries that
    stand for kernels: their time is in the operation that started them.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    training = {event.thread for event in events if event.name.startswith((SCOPE, BACKWARD))}
    events = [event for event in events if event.thread in training]
    forward: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and (scope := _scope(event)):
            forward.setdefault(event.sequence_nr, scope)
    found: dict[str, Time] = defaultdict(Time)
    for event in events:
        around = event
        while around and not around.name.startswith((SCOPE, BACKWARD)):
            around = around.cpu_parent
        backward = around is not None and around.name.startswith(BACKWARD)
        if around is None:
            part = UNCLAIMED
        elif backward:
            part = forward.get(around.sequence_nr, UNCLAIMED)
        else:
            part = around.name.removeprefix(SCOPE)
        own = event.self_cpu_time_total
        if gpu:  # a scope starts no kernel; what is said of it is its operations' again
            own = 0.0 if event.name.startswith(SCOPE) else event.self_device_time_total
        time = found[part]
        time.flops += event.flops or 0
        if backward:
            time.backward += own
        else:
            time.forward += own
    return dict(found)


def _scope(event: Any) -> str | None:
    while event is not None and not event.name.startswith(BACKWARD):
        if event.name.startswith(SCOPE):
            return event.name.removeprefix(SCOPE)
        event = event.cpu_parent
    return None


def table(parts: dict[str, Time], steps: int, seconds: float) -> str:
    """Markdown, the largest part first; what no operation accounts for is ``between``."""
    whole = seconds * 1e6
    lines = ["| part | forward ms | backward ms | share | GFLOP/s |", "|---|---|---|---|---|"]
    for name, time in sorted(parts.items(), key=lambda item: -item[1].forward - item[1].backward):
        own = time.forward + time.backward
        rate = f"{time.flops / own / 1e3:,.0f}" if time.flops and own else ""
        cells = (
            f"{time.forward / steps / 1e3:,.1f}",
            f"{time.backward / steps / 1e3:,.1f}",
            f"{own / whole:.1%}",
            rate,
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    between = whole - sum(time.forward + time.backward for time in parts.values())
    lines.append(f"| between | {between / steps / 1e3:,.1f} | | {between / whole:.1%} | |")
    return "\n".join(lines)


def run(given: argparse.Namespace, scratch: Path) -> str:
    """Train, profile, and say what was found."""
    from alignlab.engine import local
    from alignlab.models.flops import ModelFlops

    gpu = torch.cuda.is_available()
    order = {
        "model": str(bench.model_folder(given, scratch)), "objective": given.objective, "dtype": given.dtype,
        "max_length": given.max_length, "seed": given.seed, "batch": given.batch, "micro_batch": given.micro_batch,
        "learning_rate": given.learning_rate,
        # The rows of the steps alone: a reference pass over a whole file would take longer than all that is measured.
        "options": {"data.limit": given.batch * (given.warm + given.steps), **bench_cases.options_of(given)},
    }  # fmt: skip
    job, _ = bench_side.job_of(order, given.data, given.warm + given.steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    profiler = profile(activities=activities, with_flops=True, record_shapes=True)
    steps = Steps(profiler, given.warm)
    pairs_only = replace(ModelFlops.of(job.scorer.model), matmul=0, matmul_trained=0, head=0, head_trained=0)
    score, seen = job.engine.score, []

    def counted(batch: Any, ask: Any) -> Any:
        if steps.clock is not None:
            seen.append(pairs_only.of_batch(batch, ask, torch.is_grad_enabled()) * batch.weight)
        return score(batch, ask)

    job.engine.score = counted
    job.engine.step = scoped(OPTIMIZER, job.engine.step)
    waited = job.loader.waited
    with scopes(job.scorer.inner), mock.patch.object(local, "clip_", scoped(CLIP, local.clip_)):
        bench_side.train(job, steps)
    profiler.stop()
    job.engine.close()
    parts = by_part(profiler.events(), gpu)
    if ATTENTION in parts:  # the profiler does not count the kernel on every device
        parts[ATTENTION].flops = sum(work.item() for work in seen)
    rate = bench_side.matmul_side({"dtype": given.dtype})["flops_per_second"]
    waiting = (job.loader.waited - waited) / (steps.count + given.warm)
    speed = steps.flops / steps.seconds
    told = [
        f"{steps.seconds / steps.count:.3f} s a step ({steps.count} steps, layout {job.scorer.layout}, "
        f"{torch.get_num_threads()} threads); waited for data {waiting:.3f} s",
        f"the model's own work: {steps.flops / steps.count / 1e9:,.1f} GFLOP a step, {speed / 1e9:,.0f} GFLOP/s; "
        f"the machine's matrix products: {rate / 1e9:,.0f} GFLOP/s; MFU {speed / rate:.2f}",
    ]
    if given.json:
        found = {name: vars(time) for name, time in parts.items()}
        text = {"parts": found, "steps": steps.count, "seconds": steps.seconds, "flops": steps.flops, "rate": rate}
        given.json.write_text(json.dumps(text, indent=1) + "\n")
    return "\n".join([table(parts, steps.count, steps.seconds), "", *told])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_shared(parser, steps=2)
    parser.add_argument("--warm", type=int, default=1, help="steps before the profiler runs")
    given = parser.parse_args(arguments)
    if not (given.objective and given.data):
        parser.error("--objective and --data are needed")
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="profile-") as scratch:
        print(run(given, Path(scratch)))


if __name__ == "__main__":
    main(sys.argv[1:])
