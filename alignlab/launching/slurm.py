"""Slurm: inside an allocation one torchrun a node (``launch=slurm``); outside, a batch script (``launch=sbatch``)."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignlab.config import LaunchConfig, RunConfig
from alignlab.configuration import keys, plugins, schema
from alignlab.configuration.frozen import frozen_text
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError
from alignlab.launching.launch import run_folder, run_group, supervise, torchrun
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder

FIRST_PORT, PORTS = 20000, 20000


@dataclass(frozen=True)
class Allocation:
    """This node's place in a job step: ``node_rank`` of ``nodes`` (host names in rank order)."""

    job: str
    restarts: str
    step: str
    nodes: tuple[str, ...]
    node_rank: int

    @property
    def port(self) -> int:
        """The rendezvous port: by job, so that two jobs on a host do not meet."""
        return FIRST_PORT + int(self.job) % PORTS

    @property
    def token(self) -> str:
        """What all nodes of one start share."""
        return f"slurm:{self.job}:{self.restarts}:{self.step}"

    def rendezvous(self) -> list[str]:
        """torchrun's arguments: static, so that rank = node_rank x processes + local rank."""
        if len(self.nodes) == 1:
            return ["--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(self.port)]
        return [
            "--nnodes", str(len(self.nodes)), "--node-rank", str(self.node_rank),
            "--master-addr", self.nodes[0], "--master-port", str(self.port),
        ]  # fmt: skip


def expand_nodelist(text: str) -> list[str]:
    """``gpu[01-03,7],login1`` -> gpu01 gpu02 gpu03 gpu7 login1, in Slurm's order; several brackets multiply."""
    hosts: list[str] = []
    for part in _split_outside_brackets(text):
        hosts += _expand(part)
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    if depth:
        raise ConfigError(f"node list '{text}': brackets do not match")
    return [part for part in [*parts, current] if part]


def _expand(pattern: str) -> list[str]:
    found = re.search(r"\[([^\]]*)\]", pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], _expand(pattern[found.end() :])
    numbers: list[str] = []
    for piece in found.group(1).split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"node list '{pattern}': cannot read '{piece}'")
        width = len(first) if first.startswith("0") else 0
        numbers += [str(n).zfill(width) for n in range(int(first), int(last or first) + 1)]
    return [head + number + rest for number in numbers for rest in tail]


def allocation(environment: Mapping[str, str]) -> Allocation:
    """This process's place, from the variables ``srun`` sets; :class:`ConfigError` says how to start instead."""
    if "SLURM_JOB_ID" not in environment or "SLURM_NODEID" not in environment:
        raise ConfigError(
            "launch=slurm runs inside an allocation: srun --ntasks-per-node=1 alignlab train ... launch=slurm "
            "(launch=sbatch submits a job)"
        )
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise ConfigError("launch=slurm wants one task a node: srun --ntasks-per-node=1 (torchrun starts the ranks)")
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    nodes = tuple(expand_nodelist(listed))
    rank = int(environment["SLURM_NODEID"])
    if rank >= len(nodes):
        raise ConfigError(f"node {rank} is not among the {len(nodes)} of SLURM_JOB_NODELIST={listed}")
    return Allocation(
        environment["SLURM_JOB_ID"],
        environment.get("SLURM_RESTART_COUNT", "0"),
        environment.get("SLURM_STEP_ID", "0"),
        nodes,
        rank,
    )


def run_node(request: Request, processes: int) -> int:
    """This node's share of a job: the first node settles the run folder, every node starts one torchrun."""
    place = allocation(os.environ)

    def work(folder: RunFolder) -> int:
        return supervise(folder, torchrun(folder, processes, place.rendezvous()), request.json)

    return run_group(request, leader=place.node_rank == 0, token=place.token, work=work)


def script(launch: LaunchConfig, name: str, command: list[str], log: str, folder: str) -> str:
    """The batch script: saved 180 s before the time limit or on preemption, then queued again (exit code 75)."""
    gpus = launch.gpus_per_node if launch.gpus_per_node is not None else _number(launch.nproc)
    options: list[str | None] = [
        f"--job-name={name}",
        f"--nodes={launch.nnodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={gpus}" if gpus else None,
        f"--cpus-per-task={launch.cpus_per_task}" if launch.cpus_per_task else None,
        f"--time={launch.time}",
        f"--partition={launch.partition}" if launch.partition else None,
        f"--account={launch.account}" if launch.account else None,
        "--signal=USR2@180",
        "--requeue",
        "--open-mode=append",
        f'--output="{log}"',
        f'--chdir="{folder}"',
        *launch.extra,
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options if option is not None)]
    return "\n".join(
        [
            *lines,
            "",
            f"srun --ntasks-per-node=1 --kill-on-bad-exit=1 {shlex.join(command)}",
            "code=$?",
            "# 75: stopped on request, everything is saved",
            'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def submit(request: Request) -> int:
    """Freeze the configuration, write the script beside it and hand it to ``sbatch``; dry_run only prints it."""
    config = request.config
    folder = run_folder(config)
    command = [sys.executable, "-m", "alignlab", "train", str(folder.run_yaml), "launch=slurm"]
    if config.model.trust_remote_code:  # typed for this run; a file cannot ask for it
        command.append("model.trust_remote_code=true")
    text = script(config.launch, folder.name, command, str(folder.logs / "slurm-%j.log"), str(Path.cwd()))
    if config.launch.dry_run:
        print(text, end="")
        emit(request, {"run": folder.name, "path": str(folder), "script": text})
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("launch=sbatch: no sbatch command here; launch.dry_run=true prints the script")
    with folder.claim():
        if folder.finished and config.resume != "never":
            print(f"{'run':<8} {folder.name} -> {folder}   (finished)")
            return 0
        if folder.foreign and not config.overwrite:
            raise ConfigError(f"{folder}: holds files that are no run's; choose another run.name or output_dir")
        folder.logs.mkdir(exist_ok=True)
        if not folder.exists:
            plugins.copy(request.plugins, folder.plugins)
            frozen = dataclasses.replace(config, run=RunConfig(folder.name))
            write_atomic(folder.run_yaml, frozen_text(frozen, request.provenance))
            found = keys.record(schema.flatten(frozen), request.provenance, request.stated, request.reads)
            keys.write(folder.path, found)
            folder.write_status(state="submitted", attempt=0, step=0, exit_code=None, error=None)
        path = folder.path / "launch.sbatch"
        write_atomic(path, text)
        answer = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
        if answer.returncode:
            raise ConfigError(f"sbatch refused the job: {' '.join(answer.stderr.split())}")
        job = answer.stdout.strip().split(";")[0]
        folder.write_status(job=job)
    print(f"{'run':<8} {folder.name} -> {folder}   (submitted as job {job})")
    emit(request, {"run": folder.name, "path": str(folder), "job": job, "state": "submitted"})
    return 0
