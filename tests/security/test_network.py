"""A run on one node listens on the loopback only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

LISTEN = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def family(root: int) -> set[int]:
    """``root`` and all processes below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(processes: set[int]) -> set[str]:
    """Addresses (hexadecimal, as the kernel shows them) on which ``processes`` listen."""
    owned = set()
    for process in processes:
        try:
            for handle in Path(f"/proc/{process}/fd").iterdir():
                target = os.readlink(handle)
                if target.startswith("socket:["):
                    owned.add(target[8:-1])
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and fields[9] in owned:
                    found.add(fields[1].split(":")[0])
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system shows no sockets in /proc")
def test_two_ranks_listen_on_the_loopback_only(tmp_path: Path) -> None:
    words = [
        "train", "model=tiny", "data=sums", "objective=sft", "engine=zero1", "launch=torchrun", "launch.nproc=2",
        "train.max_steps=2", "train.global_batch_size=2", "data.options={rows: 8}", "run.name=x",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNLAB_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "alignlab", *words], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen: set[str] = set()
    most = 0
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        below = family(process.pid)
        most = max(most, len(below))
        seen |= listening(below)
        time.sleep(0.2)
    process.kill() if process.poll() is None else None
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert most >= 3
    assert seen, "the rendezvous listens somewhere"
    assert seen <= LOOPBACK
