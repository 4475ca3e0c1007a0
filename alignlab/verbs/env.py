"""``alignlab env``: versions, devices and the cache; also what a run's ``env.json`` holds."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import alignlab
from alignlab.data import cache
from alignlab.request import Request, emit

PACKAGES = (
    "torch", "transformers", "deepspeed", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "pyarrow",
    "hydra-core", "omegaconf", "datasets", "bitsandbytes", "flash-attn", "triton",
    "liger-kernel", "wandb",
)  # fmt: skip
VARIABLES = ("ALIGNLAB_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""The only environment variables that are ever recorded; secrets live in others."""
JOB = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "TORCHELASTIC_RUN_ID")


def run(request: Request) -> int:
    """Print the environment."""
    found = collect() | {"devices": devices(), "cache": cache_summary()}
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}")
            for key, item in value.items():
                print(f"  {key:<22} {item}")
        else:
            print(f"{name:<24} {value}")
    emit(request, found)
    return 0


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def collect() -> dict[str, Any]:
    """Versions, host and job: what explains a difference between two runs."""
    versions = installed(PACKAGES)
    return {
        "alignlab": alignlab.__version__,
        "commit": commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "folder": os.getcwd(),
        "cpus": os.cpu_count(),
        "gpus": gpus(),
        "packages": versions,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "job": {name: os.environ[name] for name in JOB if name in os.environ},
    }


def commit() -> str | None:
    """The checkout's commit, ``+`` where files differ from it; None when installed."""
    folder = Path(alignlab.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def gpus() -> list[str]:
    """This node's GPUs with their driver, as the driver's own tool names them; empty where there is none.

    torch would open a context on a GPU to tell its name, and the launcher, which asks, leaves the memory to the ranks.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.splitlines() if found.returncode == 0 else []


def devices() -> dict[str, Any]:
    """GPUs as torch sees them."""
    import torch

    found: dict[str, Any] = {"gpus": torch.cuda.device_count(), "threads": torch.get_num_threads()}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"gpu {number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def cache_summary() -> dict[str, Any]:
    """Where the cache is and how much it holds."""
    entries = cache.listing()
    return {"path": str(cache.root()), "entries": len(entries), "bytes": sum(entry.size for entry in entries)}
