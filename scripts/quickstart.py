"""Train the five objectives on the built-in world and show, before and after, what each of them changed.

    python scripts/quickstart.py [output_dir=runs/quickstart] [seed=0] [workers=2]

Stage 1 trains ``tiny`` by SFT on demonstrations, mistakes included.  Stage 2 starts every objective from that one
checkpoint: SFT continued (what any longer training would give), IFT, DPO, CPSFT and then CPO, and a reward model with
the Eurus objective.  Each figure is measured by the world's verifier on held-out prompts and generated text, or on
held-out pairs.  Needs no download; ends with one table, ``curves.png`` and ``report.html`` in the output folder.
"""

from __future__ import annotations

import html
import json
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED: dict[str, Any] = {"data": "sums", "engine": "local", "launch": "inline", "logger": ["jsonl"]}


@dataclass(frozen=True)
class Job:
    """One training: what it is called, where it starts, and what it sets on top of ``SHARED``."""

    name: str
    start: str | None
    settings: dict[str, Any] = field(default_factory=dict)


BATCH = 24
SECOND = 80
"""Optimizer steps of every second stage, SFT continued included."""
HELD_OUT = {"eval.generate": 200, "eval.batch_size": 100, "eval.max_new_tokens": 64}
STYLE = {"data.condition.buckets": [{"condition": {"steps": "any", "phrasing": "any"}, "max_count": 10**6}]}
"""Controlled: how much working is shown, how the answer is phrased.  Free, and so maximised by CPO: being right."""
CPO = {
    "objective.loss_type": ["sigmoid", "sft"], "objective.loss_weights": [1.0, 1.0], "objective.beta": 0.3,
    "data.condition.weights": {"correctness": 2.0},
}  # fmt: skip
"""The likelihood term keeps the style that CPSFT has taught; without it control falls as being right rises."""


def settings(objective: str, steps: int, rate: float, seed: int, **more: Any) -> dict[str, Any]:
    """One training's keys; ``seed`` chooses the training problems, which no two stages share."""
    rows = (6 if objective in ("cpsft", "cpo") else BATCH) * steps  # about one epoch: a rated row makes several
    return {
        "objective": objective, "train.max_steps": steps, "train.global_batch_size": BATCH, "optim": "adamw",
        "optim.learning_rate": rate, "optim.warmup_ratio": 0.1, "optim.beta2": 0.99, "train.logging_steps": 5,
        "train.token_budget": 2048, "data.options": {"rows": rows, "eval_rows": 300, "seed": seed}, **HELD_OUT, **more,
    }  # fmt: skip


def jobs(seed: int) -> tuple[Job, ...]:
    """All trainings of one seed; the first stage sees problems ``2 seed``, the second ``2 seed + 1``."""
    first, second = 2 * seed, 2 * seed + 1
    return (
        Job("sft", None, settings("sft", 700, 2.5e-3, first)),
        Job("cpsft", "sft", settings("cpsft", 3 * SECOND, 2.5e-3, second, **STYLE)),
        Job("dpo", "sft", settings("dpo", SECOND, 2e-4, second, **{"objective.beta": 0.5})),
        Job("sft-continued", "sft", settings("sft", SECOND, 1e-3, second)),
        Job("ift", "sft", settings("ift", SECOND, 1e-3, second)),
        Job("cpo", "cpsft", settings("cpo", 120, 3e-4, second, **CPO, **STYLE)),
        Job("reward", "sft", settings("reward", SECOND, 1e-3, second, **{"objective.loss_type": "eurus"})),
    )


@dataclass(frozen=True)
class Row:
    """One line of the table: a metric of a run before and after, and what SFT continued gives for it."""

    label: str
    job: str
    metric: str
    percent: bool = True
    control: bool = True


ROWS: tuple[Row, ...] = (
    Row("SFT (from nothing): answers right", "sft", "eval_correct", control=False),
    Row("IFT: answers right", "ift", "eval_correct"),
    Row("DPO: answers right", "dpo", "eval_correct"),
    Row("CPSFT: requested style achieved", "cpsft", "eval_control/match", control=False),
    Row("CPO: requested style achieved", "cpo", "eval_control/match", control=False),
    Row("CPO: answers right, any style", "cpo", "eval_correct", control=False),
    Row("Eurus reward: pairs ranked right", "reward", "eval_accuracy", control=False),
    Row("Eurus reward: chosen above zero", "reward", "eval_rewards/chosen_positive", control=False),
    Row("Eurus reward: rejected below zero", "reward", "eval_rewards/rejected_negative", control=False),
)


def run_job(job: Job, out: str, seed: int, threads: int) -> float:
    """Train one job in this process (its console output goes to a file); returns the seconds it took."""
    import torch

    import alignlab

    started = time.perf_counter()
    torch.set_num_threads(threads)
    keys = {**SHARED, **job.settings, "run.name": job.name, "output_dir": out, "seed": seed}
    keys["data.options"] = {**keys["data.options"], "eval_seed": seed}
    keys["model"] = "tiny" if job.start is None else str(Path(out) / job.start / "model")
    log = Path(out) / f"{job.name}.console.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        sys.stdout, keep = stream, sys.stdout
        try:
            alignlab.run("train", None, **keys)
        finally:
            sys.stdout = keep
    return time.perf_counter() - started


def train_all(todo: tuple[Job, ...], out: Path, seed: int, workers: int) -> None:
    """Every job as soon as its start is there, ``workers`` at a time, under one progress display."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    waiting, running = list(todo), {}
    cores = os.cpu_count() or 1
    done: set[str | None] = {None}
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        Progress(*columns, disable=not sys.stdout.isatty()) as bar,
    ):
        bars: dict[str, Any] = {}
        while waiting or running:
            for job in [j for j in waiting if j.start in done and len(running) < workers]:
                if len(running) < workers:
                    waiting.remove(job)
                    threads = cores if job.start is None else max(1, cores // workers)  # the first one runs alone
                    running[job.name] = pool.submit(run_job, job, str(out), seed, threads)
                    bars[job.name] = bar.add_task(job.name, total=job.settings["train.max_steps"])
            time.sleep(0.3)
            for name, future in list(running.items()):
                bar.update(bars[name], completed=_step(out / name))
                if future.done():
                    _finished(name, future)
                    done.add(name)
                    del running[name]


def _step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "status.json").read_text()).get("step", 0))
    except (OSError, ValueError):
        return 0


def _finished(name: str, future: Future[float]) -> None:
    print(f"{name:<12} trained in {future.result():.0f} s", flush=True)


def results(todo: tuple[Job, ...], out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Run -> {before, after} -> metric -> value."""
    return {job.name: json.loads((out / job.name / "result.json").read_text()) for job in todo}


def table(found: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """The rows of the final table as text."""
    lines = []
    for row in ROWS:
        before, after = (found[row.job][side].get(row.metric) for side in ("before", "after"))
        continued = found["sft-continued"]["after"].get(row.metric) if row.control else None
        lines.append([row.label, *(_figure(value, row.percent) for value in (before, after, continued))])
    return lines


def _figure(value: float | None, percent: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"


HEADS = ("held-out measure", "before", "after", "SFT continued")


def show(lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*HEADS)
    for line in lines:
        drawn.add_row(*line)
    Console(width=110).print(drawn)


def page(todo: tuple[Job, ...], out: Path, lines: list[list[str]], seconds: float) -> Path:
    """``report.html``: the table, the curves, and a few prompts with what the models answered."""
    sys.path.insert(0, str(HERE))
    from curves import draw

    draw({job.name: out / job.name for job in todo}, ("loss", "grad_norm", "rewards/accuracies"), out / "curves.png")
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    text = (
        "<!doctype html><meta charset=utf-8><title>alignlab quickstart</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.3rem .8rem;text-align:left}"
        "pre{background:#f4f4f4;padding:.6rem;white-space:pre-wrap}img{max-width:100%}</style>"
        f"<h1>alignlab quickstart</h1><p>{len(todo)} trainings in {seconds:.0f} s. Measured on held-out prompts by the "
        f"world's verifier.</p><table><tr>{heads}</tr>{cells}</table><h2>Curves</h2><img src=curves.png alt='curves'>"
        f"<h2>Some answers</h2>{_answers_html(todo, out)}"
    )
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _answers_html(todo: tuple[Job, ...], out: Path, count: int = 3) -> str:
    parts = []
    for job in todo:
        files = sorted((out / job.name / "eval").glob("generated-*.json"), key=lambda p: int(p.stem.split("-")[1]))
        if not files:
            continue
        for answer in json.loads(files[-1].read_text())[:count]:
            asked = answer["prompt"] if isinstance(answer["prompt"], str) else answer["prompt"][-1]["content"]
            said = f"{asked}\n-> {answer['texts'][0]}\n{answer['measures'][0]}"
            parts.append(f"<h4>{job.name}</h4><pre>{html.escape(said)}</pre>")
    return "".join(parts)


def main(arguments: list[str]) -> int:
    given = dict(word.split("=", 1) for word in arguments)
    unknown = set(given) - {"output_dir", "seed", "workers"}
    if unknown:
        print(f"unknown argument {sorted(unknown)[0]}; known: output_dir, seed, workers", file=sys.stderr)
        return 2
    out, seed = Path(given.get("output_dir", "runs/quickstart")), int(given.get("seed", 0))
    workers = int(given.get("workers", min(2, os.cpu_count() or 1)))
    started = time.perf_counter()
    todo = jobs(seed)
    train_all(todo, out, seed, workers)
    lines = table(results(todo, out))
    show(lines)
    report = page(todo, out, lines, time.perf_counter() - started)
    print(f"done in {time.perf_counter() - started:.0f} s; curves and answers: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
