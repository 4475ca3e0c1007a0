"""From a checked configuration to running workers, and their outcome to an exit code.

The launcher owns the run folder, freezes ``run.yaml`` into it and starts the workers on that file: in this process
for one device, else through torchrun as a child.  torchrun turns every failure into exit code 1, so the code is read
from ``status.json``, which the workers write.  Workers never compose.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from alignlab import heartbeat, pids
from alignlab.config import RootConfig, RunConfig
from alignlab.configuration import keys, names, plugins, schema, yamlio
from alignlab.configuration.checks import redact
from alignlab.configuration.frozen import flat_file, frozen_text
from alignlab.durable import write_atomic
from alignlab.errors import AlignlabError, ConfigError, HangError, Preempted
from alignlab.imports import importing
from alignlab.launching.supervise import forget, lost, supervise, torchrun
from alignlab.processes import die_with_parent
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder, state_of

WAIT_SECONDS = 900.0
"""How long ranks wait for rank 0 to settle the run folder."""


def launch(request: Request) -> int:
    """Train as ``request`` says; returns the exit code of interface.md 3."""
    config = request.config
    kind, processes = decide(config)
    if kind == "sbatch":
        from alignlab.launching import slurm

        return slurm.submit(request)
    if config.launch.dry_run:
        text = dry_run_text(request, kind, processes)
        print(text)
        emit(request, {"run": names.run_name(config), "script": text})
        return 0
    if kind == "slurm":
        from alignlab.launching import slurm

        return slurm.run_node(request, processes)
    if kind == "in place":
        die_with_parent()
        return run_group(request, leader=os.environ["RANK"] == "0", token=_group_token(), work=run_inline)
    with owned(request) as (folder, state):
        if state == "finished":
            return _say_finished(request, folder)
        code = run_inline(folder) if kind == "inline" else supervise(folder, torchrun(folder, processes), request.json)
        return finish(request, folder, code)


def decide(config: RootConfig) -> tuple[str, int]:
    """(``inline`` | ``torchrun`` | ``slurm`` | ``sbatch`` | ``in place``, processes on this node).

    ``in place``: torchrun started us already.
    """
    kind = config.launch.name
    if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ and kind not in ("slurm", "sbatch"):
        if config.engine.name == "local" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("engine=local is one process, but torchrun started several; take engine=zero0 .. zero3")
        return "in place", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "sbatch":
        return kind, 0
    processes = 1 if config.engine.name == "local" or kind == "inline" else _processes(config.launch.nproc)
    if kind == "auto":
        kind = "inline" if processes == 1 else "torchrun"
    return kind, processes


def _processes(nproc: str) -> int:
    if nproc != "auto":
        return int(nproc)
    import torch

    return max(1, torch.cuda.device_count())


# ---------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def owned(request: Request) -> Iterator[tuple[RunFolder, str]]:
    """The run's folder, owned and frozen, with ``new``, ``resumed`` or ``finished``.

    An error of ours that escapes the block is recorded: traceback in log.txt, 70 in status.json.
    """
    folder = run_folder(request.config)
    with folder.claim():
        if folder.foreign and not request.config.overwrite:
            raise ConfigError(f"{folder}: holds files that are no run's; choose another run.name or output_dir")
        state = settle(folder, request)
        if state == "finished":
            yield folder, state
            return
        try:
            yield folder, state
        except AlignlabError as error:
            if folder.disowned:  # what stands in the folder is another start's
                raise
            folder.write_status(state=state_of(error.exit_code), exit_code=error.exit_code, error=redact(str(error)))
            raise
        except Exception as error:
            with folder.log.open("a", encoding="utf-8") as log:
                log.write(redact(traceback.format_exc()))
            line = f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            folder.write_status(state="failed", exit_code=70, error=redact(line))
            raise AlignlabError(f"{line} (traceback: {folder.log})") from None


def run_folder(config: RootConfig) -> RunFolder:
    """Where the run lives; a link out of ``output_dir`` is refused."""
    folder = RunFolder(Path(os.path.expanduser(config.output_dir)) / names.run_name(config))
    folder.refuse_links()
    return folder


def settle(folder: RunFolder, request: Request) -> str:
    """Decide what this start is, and write ``run.yaml``, ``env.json``, the plug-ins' copies and ``status.json``."""
    config = dataclasses.replace(request.config, run=RunConfig(folder.name))
    provenance = {**request.provenance}
    if request.config.run.name is None:
        provenance["run.name"] = "automatic"
    status = folder.status()
    if folder.exists and status.get("state") != "submitted":
        if config.resume == "never":
            if not config.overwrite:
                raise ConfigError(f"resume=never, but {folder} holds a run; add overwrite=true to replace it")
            folder.clear()
        elif differing := differences(folder, config):
            if folder.begun and not config.overwrite:
                raise ConfigError(
                    f"{folder} holds another run ({'; '.join(differing[:4])}); "
                    "choose another run.name, or add overwrite=true to replace it"
                )
            folder.clear()
        elif folder.finished:
            return "finished"
        status = folder.status()
    folder.logs.mkdir(exist_ok=True)
    forget(folder)
    plugins.copy(request.plugins, folder.plugins)
    write_atomic(folder.run_yaml, _frozen_header(folder) + frozen_text(config, provenance))
    before = keys.recorded(folder.run_yaml)
    keys.write(folder.path, keys.record(schema.flatten(config), provenance, request.stated, request.reads, before))
    from alignlab.verbs.env import collect

    write_atomic(folder.env_json, json.dumps(collect(), indent=1) + "\n")
    numbers, stated = names.number_keys(config), names.stated_keys(config)
    resumed = any(folder.checkpoints.glob("checkpoint-*"))
    folder.write_status(
        state="running",
        exit_code=None,
        error=None,
        lost=None,
        step=status.get("step", 0) if resumed else 0,
        attempt=int(status.get("attempt", 0)) + 1,
        contents={key: value for key, value in numbers.items() if value != stated[key]},
    )
    return "resumed" if resumed else "new"


def _frozen_header(folder: RunFolder) -> str:
    from alignlab import __version__

    return f"# alignlab {__version__}: the frozen configuration of run {folder.name}; comments say who set a key.\n"


def differences(folder: RunFolder, config: RootConfig) -> list[str]:
    """``key: old -> new`` for each key that can change a number and is not what the folder's run had."""
    before = flat_file(folder.run_yaml)
    contents = folder.status().get("contents", {})
    found = []
    now = names.number_keys(config)
    for key, value in now.items():
        old = contents.get(key, before.get(key))
        if old != value:
            stated = names.stated_keys(config)[key]
            changed = "its contents changed" if before.get(key) == stated else f"{yamlio.scalar(stated)}"
            found.append(f"{key}: {yamlio.scalar(before.get(key))} -> {changed}")
    return found


# ---------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------


def run_inline(folder: RunFolder) -> int:
    """The worker, in this process."""
    with importing():
        from alignlab import worker
    return worker.main(str(folder.path))


@contextmanager
def captured_output(folder: RunFolder, rank: int) -> Iterator[TextIO]:
    """Send everything this process prints to ``log.txt`` (rank 0) or ``logs/rank_N.log``; yields the real terminal.

    Works on file descriptors, so that libraries' C code is caught too.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    path = folder.log if rank == 0 else folder.logs / f"rank_{rank}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    # Under --json the screen is standard error.
    screen = 1 if sys.stdout is sys.__stdout__ else 2 if sys.stdout is sys.__stderr__ else None
    console = os.fdopen(os.dup(screen), "w", buffering=1, encoding="utf-8") if screen else sys.stdout
    with path.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield console
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in enumerate(saved, 1):
            os.dup2(original, number)
            os.close(original)
        if screen:
            console.close()


def finish(request: Request, folder: RunFolder, code: int) -> int:
    """The exit code of the run: what status.json says, else what the way its workers ended means.

    A run that wrote ``done`` is done, whatever became of its processes afterwards.
    """
    status = folder.status()
    if status.get("state") == "running":
        if code == 0:
            status = folder.write_status(state="done", exit_code=0)
        elif code == Preempted.exit_code:
            text = "stopped by a signal before the ranks could save; the same command goes on from the last checkpoint"
            status = folder.write_status(state="preempted", exit_code=code, error=text)
        else:
            status = _name_the_lost(folder, code, "")
    elif status.get("exit_code") == HangError.exit_code:
        status = _name_the_lost(folder, code, str(status.get("error") or ""))
    exit_code = int(status["exit_code"]) if status.get("exit_code") is not None else code
    if exit_code and status.get("error"):
        raise _error(exit_code, str(status["error"]))
    emit(request, {"run": folder.name, "path": str(folder), **status})
    return exit_code


def _name_the_lost(folder: RunFolder, code: int, said: str) -> dict[str, Any]:
    """Put into status.json which rank was lost; ``said`` is what a rank that missed it has written."""
    text, found = lost(folder, code)
    if said:
        text = f"{text} ({said.partition('. ')[0]})" if found else said
    done = max((beat.done for beat in heartbeat.read(folder.logs)), default=0)
    step = max(done, int(folder.status().get("step") or 0))
    return folder.write_status(state="failed", exit_code=HangError.exit_code, error=text, lost=found, step=step)


def _error(code: int, text: str) -> AlignlabError:
    error = AlignlabError(text)
    error.exit_code = code
    return error


def _say_finished(request: Request, folder: RunFolder) -> int:
    print(f"{'run':<8} {folder.name} -> {folder}   (finished)")
    emit(request, {"run": folder.name, "path": str(folder), **folder.status()})
    return 0


def dry_run_text(request: Request, kind: str, processes: int) -> str:
    """What would be started, without touching anything."""
    folder = run_folder(request.config)
    what = f"{kind}, {processes} process{'es' if processes > 1 else ''} on this node"
    command = (
        [sys.executable, "-m", "alignlab.launching.rank", str(folder)]
        if kind == "inline"
        else torchrun(folder, processes)
    )
    return f"# run {folder.name} -> {folder}\n# {what}\n{shlex.join(command)}"


# ---------------------------------------------------------------------------------------------------------------
# Several starts of one command: torchrun -m alignlab, srun alignlab
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settled:
    """What the leader tells the others through ``launch.json``."""

    token: str
    state: str
    numbers: str
    frozen: str


def run_group(request: Request, *, leader: bool, token: str, work: Any) -> int:
    """The same command was started on every rank or node: the leader settles the folder, the others wait for it.

    All of them composed, so all can compare: a rank whose configuration would give other numbers stops the launch.
    ``work(folder) -> code`` is what each then does.
    """
    numbers = names.digest(names.number_keys(request.config))
    if not leader:
        return _follow(request, token, numbers, work)
    with owned(request) as (folder, state):
        settled = _Settled(token, state, numbers, hashlib.sha256(folder.run_yaml.read_bytes()).hexdigest())
        write_atomic(folder.launch_json, json.dumps(dataclasses.asdict(settled)) + "\n")
        if state == "finished":
            return _say_finished(request, folder)
        return finish(request, folder, work(folder))


def _follow(request: Request, token: str, numbers: str, work: Any) -> int:
    folder = run_folder(request.config)
    settled = _wait_for(folder, token)
    if settled.numbers != numbers:
        raise ConfigError(f"{folder}: rank 0 composed another configuration; start all ranks with the same command")
    if settled.state == "finished":
        return 0
    if hashlib.sha256(folder.run_yaml.read_bytes()).hexdigest() != settled.frozen:
        raise ConfigError(f"{folder.run_yaml}: not what rank 0 wrote; is output_dir on a file system all nodes share?")
    return int(work(folder))


def _wait_for(folder: RunFolder, token: str) -> _Settled:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            settled = _Settled(**json.loads(folder.launch_json.read_text()))
        except (OSError, ValueError, TypeError):
            settled = None
        if settled is not None and settled.token == token:
            return settled
        time.sleep(0.1)
    raise HangError(f"{folder}: rank 0 has not settled the run folder within {WAIT_SECONDS:.0f} s")


def _group_token() -> str:
    """What the ranks of one torchrun share and two torchruns do not."""
    parts = [os.environ.get(n, "") for n in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    parts.append(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        # One node: all ranks are children of one agent, whose start sets this launch apart from an earlier one.
        parts += [str(os.getppid()), pids.started(os.getppid()) or ""]
    return ":".join(parts)
