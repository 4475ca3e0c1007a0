"""One rank of a training run: everything between a frozen configuration and the exported model.

Started by the launcher as ``python -m alignlab.launching.rank RUN_FOLDER``, or called in its process for one device.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch

from alignlab import dist, heartbeat
from alignlab.config import RootConfig
from alignlab.configuration import keys
from alignlab.configuration.checks import redact
from alignlab.configuration.frozen import load_frozen
from alignlab.configuration.schema import flatten
from alignlab.configuration.watch import plain, watched
from alignlab.data.ledger import SAMPLES_FILE, StepLedger
from alignlab.data.loader import Ahead
from alignlab.durable import write_atomic
from alignlab.engine import checkpoint
from alignlab.errors import AlignlabError, ConfigError, HangError, OutOfMemoryError, Preempted, StorageError
from alignlab.launching.launch import captured_output
from alignlab.measuring.verification import as_json, verified
from alignlab.models.flops import ModelFlops, peak_rate
from alignlab.processes import StopFlag
from alignlab.runfolder import RunFolder, state_of
from alignlab.runs import nonfinite
from alignlab.runs.export import export_model
from alignlab.runs.header import done_text, header, write_data_account
from alignlab.runs.job import Job, assemble, attach_reference, check_flags, prepare_data
from alignlab.runs.resume import describe, resume
from alignlab.train.hooks import RunHooks
from alignlab.train.logging import Console, Sink, json_numbers, make_sinks, peak_memory
from alignlab.train.loop import BadStep, Progress, context_of, fit
from alignlab.train.margins import MarginRecorder
from alignlab.train.rewards import evaluate_held_out
from alignlab.train.shadow import evaluate_shadows
from alignlab.train.step import passes
from alignlab.types import Unit

SILENCE_SECONDS = 3.0
"""How long a failed rank waits for rank 0 to say what happened before it says so itself."""


def run(config: RootConfig, folder: RunFolder, stop: StopFlag, stream: TextIO) -> dict[str, float]:
    """Train one rank from where the folder's checkpoints leave off; returns the last held-out metrics.

    ``stream`` is the user's screen.  Raises :class:`Preempted` when a signal asked for a stop and the state is saved.
    """
    console = Console(stream, quiet=not dist.is_main())
    started = time.perf_counter()
    reads: set[str] = set()
    config = watched(config, reads)
    data = prepare_data(config)  # before the process group exists; one rank of a node builds, the others wait
    check_flags(data)
    dist.init(timeout=config.engine.timeout, group=config.engine.name.startswith("zero"))
    dist.agree("the data index", data.train.index.hash)
    _stop_early(stop)
    job = assemble(config, data)
    try:
        return _train(job, folder, console, stop, started, reads)
    finally:
        console.close()
        if dist.is_main():
            with suppress(StorageError):  # nothing but the account of what was read
                keys.add_reads(folder.path, reads)
        job.engine.close()


def _train(
    job: Job, folder: RunFolder, console: Console, stop: StopFlag, started: float, reads: set[str]
) -> dict[str, float]:
    config, engine, objective = job.config, job.engine, job.data.objective
    checkpoint.clean(folder.checkpoints)
    with heartbeat.doing("reference"), _memory_errors(job):
        reference_seconds = attach_reference(job, lambda text: console.line("waiting", text))
    _stop_early(stop)
    heartbeat.phase("load")
    progress = _resume(job, folder, console)
    heartbeat.done(progress.step)
    ledger, margins = _accounts(job, folder, progress)
    attempt = int(folder.status().get("attempt", 1))
    if dist.is_main():
        write_data_account(folder, job)
        told = replace(job, config=plain(config))  # what is only said is not read
        for head, text in header(told, folder, progress, reference_seconds):
            console.line(head, text)
    sinks: list[Sink] = []
    if dist.is_main():
        sinks = make_sinks(config.logger, folder.path, attempt, folder.name, flatten(config), console.line)

    def held_out(now: Progress) -> dict[str, float]:
        return _held_out(job, folder, now, console)

    hooks = RunHooks(
        engine=engine, train=config.train, total_steps=job.plans.total_steps, console=console, sinks=sinks,
        evaluate=held_out if job.held_plans is not None or job.shadows else None,
        save=lambda now: _save(job, folder, now, ledger, margins),
        record=lambda report: ledger.record(report.plan, skipped=not report.updated) if ledger else None,
        export=lambda step: _export(job, folder.exports / f"step-{step}"),
        write_status=lambda now: _status(folder, state="running", step=now.step, total=job.plans.total_steps),
        stop_requested=stop, data_wait=lambda: job.loader.waited, start=progress,
        peak_rate=peak_rate(engine.device, job.loaded.dtype),
        begun=lambda: _warn_of_unread(folder, console, reads),
    )  # fmt: skip
    try:
        before = held_out(progress) if hooks.evaluate and progress.step == 0 else _first_held_out(folder)
        if before and progress.step == 0:
            hooks.log_metrics(0, before)
        if progress.step < job.plans.total_steps:
            with _memory_errors(job, training=True), Ahead(job.plans, job.loader, passes(objective)) as plans:
                progress = fit(
                    engine, objective, plans, job.loader, config.optim, config.train, config.seed, progress, hooks,
                    on_bad_step=lambda bad: _bad_step(job, folder, hooks, bad), flops=ModelFlops.of(job.scorer.model),
                    margins=margins,
                )  # fmt: skip
        if progress.step < job.plans.total_steps:
            raise Preempted(f"stopped at step {progress.step} of {job.plans.total_steps}; the same command goes on")
        after = held_out(progress) if hooks.evaluate else {}
        if after:
            hooks.log_metrics(progress.step, after)
        _export(job, folder.model)
    finally:
        hooks.close()
        if ledger:
            with suppress(StorageError):  # a run that ends well has written all with its last checkpoint
                ledger.flush()
    if dist.is_main():
        result = {"before": json_numbers(before), "after": json_numbers(after)}
        write_atomic(folder.path / "result.json", json.dumps(result, indent=1) + "\n")
        console.line("done", done_text(before, after, folder, time.perf_counter() - started))
    return after


def _export(job: Job, target: Path) -> None:
    with heartbeat.doing("export"):
        export_model(job, target)


def _stop_early(stop: StopFlag) -> None:
    """A signal came before the first step: all ranks leave together, and nothing has to be saved."""
    if any(dist.all_gather_object(stop.set)):
        raise Preempted("stopped before the first step of this start; the same command goes on")


# ---------------------------------------------------------------------------------------------------------------
# State on disk
# ---------------------------------------------------------------------------------------------------------------


def _warn_of_unread(folder: RunFolder, console: Console, reads: set[str]) -> None:
    """After the first step: one line, on the screen and in the log, with what the user set and nothing has read."""
    if not dist.is_main():
        return
    text = keys.warning(keys.add_reads(folder.path, reads))
    if text:
        console.line("warning", text)
        logging.getLogger(__name__).warning(text)


def _accounts(job: Job, folder: RunFolder, progress: Progress) -> tuple[StepLedger | None, MarginRecorder | None]:
    """Rank 0's ledger, and every rank's record of its pairs' margins, without the steps that will be done again."""
    ledger, margins, error = None, None, None
    index, example = job.data.train.index, job.data.objective.example
    try:
        if dist.is_main():
            account = job.data.train.folder / SAMPLES_FILE
            ledger = StepLedger(folder.ledger, account, index, example, progress.step)
        if example is Unit.PAIR:
            place = folder.ledger if dist.is_main() else None
            margins = MarginRecorder(job.engine, place, index, progress.step)
    except StorageError as caught:
        error = caught
    dist.raise_together(error)
    return ledger, margins


@heartbeat.doing("save")
def _save(
    job: Job, folder: RunFolder, progress: Progress, ledger: StepLedger | None, margins: MarginRecorder | None
) -> None:
    if margins:
        margins.gather()

    def write(staging: Path) -> None:
        # Before the checkpoint counts: a step that is not replayed must stand in the ledger.
        if ledger:
            ledger.flush()
        if margins:
            margins.flush()
        job.engine.save(staging)

    meta = describe(job, folder, progress)
    checkpoint.publish(folder.checkpoints, progress.step, write, meta, job.engine.state_bytes())
    checkpoint.retain(folder.checkpoints, job.config.train.save_total_limit)
    _status(folder, step=progress.step, checkpoint=progress.step)


def _resume(job: Job, folder: RunFolder, console: Console) -> Progress:
    """The progress of the checkpoint to go on from, its state loaded; a fresh one where there is none."""
    progress, damaged = resume(job, folder)
    if dist.is_main() and damaged:
        for line in damaged:
            console.line("damaged", f"{line}; passed over, kept as {checkpoint.DAMAGED}checkpoint-...")
        folder.write_status(damaged=damaged)
    return progress


def _bad_step(job: Job, folder: RunFolder, hooks: RunHooks, bad: BadStep) -> str:
    """Keep a step that is not finite; where the run stops at it, its row of metrics is written here."""
    where = nonfinite.of_step(job, folder, bad)
    if job.config.train.nonfinite == "stop":
        hooks.log_metrics(bad.plan.step + 1, bad.metrics)
    else:
        hooks.console.line("warning", f"step {bad.plan.step + 1} is not finite and was skipped. {where}")
    return where


@contextmanager
def _memory_errors(job: Job, *, training: bool = False) -> Iterator[None]:
    """Out of memory: the rank, the rows of the micro-batch, and the setting to try."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        busy = next((one for one in (job.held_loader, job.loader) if one is not None and one.current is not None), None)
        alone = busy is not None and busy.current is not None and busy.current.last.numel() == 1
        knobs = f"Lower {'data.max_length' if alone else 'train.token_budget'}"
        if training and not job.config.train.gradient_checkpointing:
            knobs += ", or set train.gradient_checkpointing=true"
        rows = f" At rows {busy.current_text()}." if busy is not None else ""
        raise OutOfMemoryError(f"rank {dist.rank()}: {_first_line(error)} (peak {_peak()}).{rows} {knobs}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; not every allocator has a class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _peak() -> str:
    return f"{peak_memory() / 2**30:.3g} GiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _status(folder: RunFolder, **changes: Any) -> None:
    if dist.is_main():
        folder.write_status(**changes)


# ---------------------------------------------------------------------------------------------------------------
# Held-out figures
# ---------------------------------------------------------------------------------------------------------------


@heartbeat.doing("eval")
def _held_out(job: Job, folder: RunFolder, progress: Progress, console: Console) -> dict[str, float]:
    """Held-out loss, metrics and shadow objectives on all ranks; a verifier's measures of answers on rank 0."""
    config = job.config
    found: dict[str, float] = {}
    plan = job.plans.at(min(progress.step, job.plans.total_steps - 1))
    context = context_of(job.plans, plan, progress.step, config.optim, config.seed, progress)
    job.engine.train(False)
    with _memory_errors(job):
        if job.held_plans is not None and job.held_loader is not None:
            found = evaluate_held_out(job.engine, job.data.objective, job.held_plans, job.held_loader, context)
            if warning := nonfinite.of_evaluation(job, folder, progress.step, found, context):
                console.line("warning", warning)
        found |= evaluate_shadows(job.engine, job.shadows, context)
    if config.eval.generate and job.held_plans is not None and job.data.objective.head == "lm":
        if job.engine.name == "zero3":
            raise ConfigError(
                "eval.generate during training needs whole parameters; with engine=zero3 leave it 0 and use "
                "'alignlab evaluate RUN' afterwards"
            )
        measures, answers = verified(
            job.loaded.model, job.loaded.tokenizer, job.data.encoder, config.data, job.data.needs, config.eval
        )
        found |= {f"eval_{name}": value for name, value in measures.items()}
        if dist.is_main():
            folder.eval.mkdir(exist_ok=True)
            text = json.dumps(as_json(answers), indent=1, ensure_ascii=False)
            write_atomic(folder.eval / f"generated-{progress.step}.json", text + "\n")
    job.engine.train(True)
    if dist.is_main():
        folder.eval.mkdir(exist_ok=True)
        write_atomic(folder.eval / f"step-{progress.step}.json", json.dumps(json_numbers(found), indent=1) + "\n")
    return found


def _first_held_out(folder: RunFolder) -> dict[str, float]:
    path = folder.eval / "step-0.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: float(value) for name, value in stored.items()}


# ---------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------


class _Redacted(logging.Formatter):
    """Whatever a library says, an address with a password in it say, is redacted before it is written."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextmanager
def library_log(folder: RunFolder, rank: int) -> Iterator[None]:
    """Library chatter goes to the run's log and not to the screen, while the block runs."""
    handler = logging.FileHandler(folder.log if rank == 0 else folder.logs / f"rank_{rank}.log", encoding="utf-8")
    handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)
        handler.close()


def main(run_folder: str) -> int:
    """Run one rank; the outcome stands in ``status.json`` as well as in the exit code."""
    folder = RunFolder(run_folder)
    stop = StopFlag()
    heartbeat.start(folder.logs, dist.rank())
    with captured_output(folder, dist.rank()) as stream, stop.installed(), library_log(folder, dist.rank()):
        try:
            run(load_frozen(folder.path), folder, stop, stream)
            _status(folder, state="done", exit_code=0)
            return 0
        except Exception as error:
            return _failed(folder, error)
        finally:
            heartbeat.end()
            dist.shutdown()


def _failed(folder: RunFolder, error: Exception) -> int:
    """Write the outcome; the launcher says it to the user."""
    lost = dist.lost_rank(error)
    if not isinstance(error, AlignlabError) and out_of_memory(error):
        error = OutOfMemoryError(f"rank {dist.rank()}: {_first_line(error)} (peak {_peak()}). Lower train.token_budget")
    elif lost:
        error = HangError(f"rank {dist.rank()}: another rank is gone or did not answer: {str(error).splitlines()[0]}")
    ours = isinstance(error, AlignlabError)
    code = error.exit_code if isinstance(error, AlignlabError) else 70
    text = str(error)
    if not ours:
        text = f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        text += f" (rank {dist.rank()}, {heartbeat.now.place})"
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        text += f" (traceback: {folder.log})"
    if _has_the_word(folder, code, lost):
        done = {"step": heartbeat.now.done} if heartbeat.now.done else {}
        folder.write_status(state=state_of(code), exit_code=code, error=redact(text), **done)
    return code


def _has_the_word(folder: RunFolder, code: int, lost: bool) -> bool:
    """Whether this rank says how the run ended; ``status.json`` bears one writer at a time.

    Rank 0 does, unless all it knows is that another is gone, which has said why.  Another rank does when rank 0 stays
    silent: then it alone failed, and rank 0 waits for it somewhere.
    """
    if dist.is_main():
        return not lost or folder.status().get("state") == "running"
    if code == Preempted.exit_code:  # agreed by all ranks
        return False
    deadline = time.monotonic() + SILENCE_SECONDS
    while folder.status().get("state") == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    return folder.status().get("state") == "running"
