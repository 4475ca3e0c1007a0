"""One rank of a training run: everything between a frozen configuration and the exported model.

Started as ``python -m alignlab.worker RUN_FOLDER`` by the launcher (or called in its process for one device).
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from alignlab import dist
from alignlab.checks import redact
from alignlab.compose import load_frozen
from alignlab.config import RootConfig
from alignlab.engine import checkpoint
from alignlab.errors import AlignlabError, ConfigError, HangError, OutOfMemoryError, Preempted
from alignlab.export import export_model
from alignlab.header import done_text, header, write_data_account
from alignlab.job import Job, assemble, attach_reference, prepare_data
from alignlab.launch import captured_output, die_with_parent
from alignlab.runfolder import RunFolder, state_of, write_atomic
from alignlab.schema import flatten
from alignlab.train.evaluation import evaluate
from alignlab.train.hooks import RunHooks
from alignlab.train.logging import Console, make_sinks
from alignlab.train.loop import Progress, context_of, fit
from alignlab.verification import as_json, verified

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SILENCE_SECONDS = 3.0
"""How long a failed rank waits for rank 0 to say what happened before it says so itself."""


class StopFlag:
    """Set by a signal; read at step boundaries.  The handler does nothing else, so it may fire anywhere."""

    def __init__(self) -> None:
        self.set = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the stop signals while the block runs (only a process's main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        self.set = True

    def __call__(self) -> bool:
        return self.set


def run(config: RootConfig, folder: RunFolder, stop: StopFlag, stream: TextIO) -> dict[str, float]:
    """Train one rank from where the folder's checkpoints leave off; returns the last held-out metrics.

    ``stream`` is the user's screen.  Raises :class:`Preempted` when a signal asked for a stop and the state is saved.
    """
    console = Console(stream, quiet=not dist.is_main())
    started = time.perf_counter()
    data = prepare_data(config)  # before the process group exists; one rank of a node builds, the others wait
    dist.init(timeout=config.engine.timeout, group=config.engine.name.startswith("zero"))
    dist.agree("the data index", data.train.index.hash)
    job = assemble(config, data)
    try:
        return _train(job, folder, console, stop, started)
    finally:
        console.close()
        job.engine.close()


def _train(job: Job, folder: RunFolder, console: Console, stop: StopFlag, started: float) -> dict[str, float]:
    config, engine, objective = job.config, job.engine, job.data.objective
    checkpoint.clean(folder.checkpoints)
    reference_seconds = attach_reference(job)
    progress = _resume(job, folder)
    attempt = int(folder.status().get("attempt", 1))
    if dist.is_main():
        write_data_account(folder, job)
        for head, text in header(job, folder, progress, reference_seconds):
            console.line(head, text)
    sinks = make_sinks(config.logger, folder.path, attempt, folder.name, flatten(config)) if dist.is_main() else []

    def held_out(now: Progress) -> dict[str, float]:
        return _held_out(job, folder, now)

    hooks = RunHooks(
        engine=engine, train=config.train, total_steps=job.plans.total_steps, console=console, sinks=sinks,
        evaluate=held_out if job.held_plans is not None else None,
        save=lambda now: _save(job, folder, now),
        export=lambda step: export_model(job, folder.exports / f"step-{step}"),
        write_status=lambda now: _status(folder, state="running", step=now.step, total=job.plans.total_steps),
        stop_requested=stop, data_wait=lambda: job.loader.waited,
    )  # fmt: skip
    try:
        before = held_out(progress) if hooks.evaluate and progress.step == 0 else _first_held_out(folder)
        if before and progress.step == 0:
            hooks.log_metrics(0, before)
        if progress.step < job.plans.total_steps:
            with _memory_errors(job):
                progress = fit(
                    engine, objective, job.plans, job.loader, config.optim, config.train, config.seed, progress, hooks,
                    save_batch=lambda plan: _save_nonfinite(job, folder, plan),
                )  # fmt: skip
        if progress.step < job.plans.total_steps:
            raise Preempted(f"stopped at step {progress.step} of {job.plans.total_steps}; the same command goes on")
        after = held_out(progress) if hooks.evaluate else {}
        if after:
            hooks.log_metrics(progress.step, after)
        export_model(job, folder.model)
    finally:
        hooks.close()
    if dist.is_main():
        write_atomic(folder.path / "result.json", json.dumps({"before": before, "after": after}, indent=1) + "\n")
        console.line("done", done_text(before, after, folder, time.perf_counter() - started))
    return after


# ---------------------------------------------------------------------------------------------------------------
# State on disk
# ---------------------------------------------------------------------------------------------------------------


def _save(job: Job, folder: RunFolder, progress: Progress) -> None:
    meta = {"progress": asdict(progress), "index": job.data.train.index.hash, "engine": job.engine.name}
    checkpoint.publish(folder.checkpoints, progress.step, job.engine.save, meta)
    checkpoint.retain(folder.checkpoints, job.config.train.save_total_limit)
    _status(folder, step=progress.step, checkpoint=progress.step)


def _resume(job: Job, folder: RunFolder) -> Progress:
    """The progress of the newest valid checkpoint, its state loaded; a fresh one where there is none."""
    resume = job.config.resume
    if resume == "never":
        return Progress()
    if resume == "auto":
        found = checkpoint.choose(folder.checkpoints)
        for line in found.damaged if dist.is_main() else []:
            print(f"warning  passed over a damaged checkpoint: {line}", file=sys.stderr)
        chosen = found.checkpoint
        if chosen is None:
            return Progress()
    else:
        chosen = checkpoint.verify(Path(resume))
    if chosen.meta.get("index") != job.data.train.index.hash:
        raise ConfigError(
            f"{chosen.path}: written for other data than this run's; restore the rows, or start anew with "
            "resume=never overwrite=true"
        )
    job.engine.load(chosen.path)
    return Progress(**chosen.meta["progress"])


def _save_nonfinite(job: Job, folder: RunFolder, plan: Any) -> None:
    """The samples of a step that gave a non-finite number, for inspection."""
    if not dist.is_main():
        return
    index = job.data.train.index
    samples = sorted({item.sample for one in plan.bins for item in one.items if one.weight})
    found = [{"id": index.sample_id(s), "source": index.source(s)} for s in samples]
    write_atomic(folder.path / "nonfinite.json", json.dumps({"step": plan.step + 1, "samples": found}, indent=1))


@contextmanager
def _memory_errors(job: Job) -> Iterator[None]:
    """Out of memory: the rank, the rows of the micro-batch, and the setting to try."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        alone = job.loader.current is None or job.loader.current.last.numel() == 1
        knob = "data.max_length" if alone else "train.token_budget"
        raise OutOfMemoryError(
            f"rank {dist.rank()}: {str(error).splitlines()[0]} At rows {job.loader.current_text()}. "
            f"Lower {knob}, or set train.gradient_checkpointing=true"
        ) from error


def _status(folder: RunFolder, **changes: Any) -> None:
    if dist.is_main():
        folder.write_status(**changes)


# ---------------------------------------------------------------------------------------------------------------
# Held-out figures
# ---------------------------------------------------------------------------------------------------------------


def _held_out(job: Job, folder: RunFolder, progress: Progress) -> dict[str, float]:
    """Held-out loss and metrics on all ranks; a verifier's measures of generated answers on rank 0."""
    assert job.held_plans is not None
    assert job.held_loader is not None
    config = job.config
    plan = job.plans.at(min(progress.step, job.plans.total_steps - 1))
    context = context_of(job.plans, plan, progress.step, config.optim, config.seed, progress)
    job.engine.train(False)
    found = evaluate(job.engine, job.data.objective, job.held_plans, job.held_loader, context)
    if config.eval.generate and job.data.objective.head == "lm":
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
        write_atomic(folder.eval / f"step-{progress.step}.json", json.dumps(found, indent=1) + "\n")
    return found


def _first_held_out(folder: RunFolder) -> dict[str, float]:
    path = folder.eval / "step-0.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def library_log(folder: RunFolder, rank: int) -> Iterator[None]:
    """Library chatter goes to the run's log and not to the screen, while the block runs."""
    handler = logging.FileHandler(folder.log if rank == 0 else folder.logs / f"rank_{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
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
    with captured_output(folder, dist.rank()) as stream, stop.installed(), library_log(folder, dist.rank()):
        try:
            run(load_frozen(folder.path), folder, stop, stream)
            _status(folder, state="done", exit_code=0)
            return 0
        except Exception as error:
            return _failed(folder, error)
        finally:
            dist.shutdown()


def _failed(folder: RunFolder, error: Exception) -> int:
    """Write the outcome; the launcher says it to the user."""
    import torch

    lost = dist.lost_rank(error)
    if isinstance(error, torch.OutOfMemoryError):
        error = OutOfMemoryError(f"rank {dist.rank()}: {str(error).splitlines()[0]}; lower train.token_budget")
    elif lost:
        error = HangError(f"rank {dist.rank()}: another rank is gone or did not answer: {str(error).splitlines()[0]}")
    ours = isinstance(error, AlignlabError)
    code = error.exit_code if isinstance(error, AlignlabError) else 70
    text = str(error) if ours else f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not ours:
        traceback.print_exception(error)
        text += f" (traceback: {folder.log})"
    if _has_the_word(folder, code, lost):
        folder.write_status(state=state_of(code), exit_code=code, error=redact(text))
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


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1]))
