"""Run one test function under N processes that form a gloo group, in one launch of forks (``forks.py``)."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forks


def spawn(
    test_file: str | Path,
    function: str,
    ranks: int,
    folder: Path,
    /,
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Call ``function(**arguments)`` of ``test_file`` on every rank; what each returned (JSON), in rank order.

    A rank that fails takes the others down, and the error shows the end of its output.  The result file, not the exit
    code, says that a rank came through: teardown of gloo can abort after all work is done.
    """
    out = folder / f"spawn-{function}-{ranks}"
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= environment or {}
    call = {"file": str(test_file), "function": function, "arguments": arguments, "out": str(out)}
    processes = []
    try:
        for rank in range(ranks):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (out / f"log{rank}.txt").open("wb") as log:
                processes.append(forks.zygote.fork({"call": call}, os.getcwd(), env, out=log, err=log))
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
    results = [out / f"rank{rank}.json" for rank in range(ranks)]
    for rank, result in enumerate(results):
        if not result.exists():
            logs = [(out / f"log{r}.txt").read_text()[-3000:] for r in range(ranks)]
            raise AssertionError(f"rank {rank} of {function} did not finish:\n" + "\n-----\n".join(logs))
    return [json.loads(result.read_text()) for result in results]
