"""Run one test function under N processes that form a gloo group, in one launch.

A launch costs seconds, nearly all imports, so a test puts all its cells of one world size into one function.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_CHILD = """
import importlib.util, json, sys
from pathlib import Path
path, function, arguments, out = sys.argv[1:5]
sys.path.insert(0, str(Path(path).parent))
spec = importlib.util.spec_from_file_location(Path(path).stem, path)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
from alignlab import dist
from alignlab.processes import die_with_parent
die_with_parent()
result = getattr(module, function)(**json.loads(arguments))
Path(out, f"rank{dist.rank()}.json").write_text(json.dumps(result))
dist.shutdown()
"""


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
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(environment or {})}
    command = [sys.executable, "-c", _CHILD, str(test_file), function, json.dumps(arguments), str(out)]
    processes = []
    try:
        for rank in range(ranks):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = (out / f"log{rank}.txt").open("wb")
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    results = [out / f"rank{rank}.json" for rank in range(ranks)]
    for rank, result in enumerate(results):
        if not result.exists():
            logs = [(out / f"log{r}.txt").read_text()[-3000:] for r in range(ranks)]
            raise AssertionError(f"rank {rank} of {function} did not finish:\n" + "\n-----\n".join(logs))
    return [json.loads(result.read_text()) for result in results]
