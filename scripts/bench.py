"""Training side by side: two sides on the same rows, in processes of their own, by turns.

    python scripts/bench.py --objective dpo --model smollm2 --layers 6 --data hh.jsonl.gz --against trl --trl best
    python scripts/bench.py --table a.json b.json      # what the JSON files say, as Markdown

| ``--objective`` | first side | second side |
|---|---|---|
| sft, dpo, reward | alignlab | TRL's trainer (``--trl defaults`` or ``best``), which gets rated completions as pairs |
| tree | alignlab on the rows as trees | alignlab on the same pairs, a row each, nothing shared |
| ift | alignlab's SFT | alignlab's IFT |

A *pair* is one run of each side, one after the other, and then the other way round.  Both see the same token ids in the
same steps with the same optimizer in the same dtype; where ids or losses differ the result is void and says so.  Ratios
are second / first: of processor seconds on a CPU, of wall seconds on a GPU.

``--trl best`` first tries what a careful user would (``bench_cases.candidates``) and takes the cheapest; the search is
part of the result.  ``--trl packed`` (sft) lets TRL pack the same rows into blocks: its steps then hold other rows, so
losses cannot be compared, but all ids are.  ``--cached both`` measures each side's second job on the rows, with what
its first left on the disk (``ours``: ours only).  ``--micro-batch`` fixes the examples in a micro-batch on both sides,
to compare memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_cases
import bench_report
import bench_rows
from bench_cases import Side, say

from alignlab.errors import AlignlabError

HERE = Path(__file__).resolve().parent
OBJECTIVES = ("sft", "dpo", "ift", "reward", "tree")


@dataclass(frozen=True)
class Bench:
    """Everything that both sides share."""

    arguments: argparse.Namespace
    model: Path
    scratch: Path

    def run(self, side: Side, steps: int, *, prepare_only: bool = False) -> dict[str, Any]:
        """One process; a :class:`RuntimeError` with the end of what it said where it fails."""
        given = self.arguments
        return self._process(
            {
                "side": side.program, "objective": side.objective, "model": str(self.model), "rows": str(side.rows),
                "warm_rows": str(side.warm_rows), "steps": steps, "batch": given.batch, "seed": given.seed,
                "learning_rate": given.learning_rate, "dtype": given.dtype, "max_length": given.max_length,
                "options": side.options, "trl": side.trl, "micro_batch": side.micro_batch,
                "accumulate": side.accumulate or given.batch // (side.micro_batch or 1), "prepare_only": prepare_only,
            },
            self._cache(side),
        )  # fmt: skip

    def matmul_rate(self) -> float:
        """Operations a second in a large matrix product, now."""
        order = {"side": "matmul", "dtype": self.arguments.dtype}
        return self._process(order, self.scratch)["flops_per_second"]

    def _cache(self, side: Side) -> Path:
        if side.keeps_cache:
            return self.scratch / f"kept-{side.name}"
        return Path(tempfile.mkdtemp(dir=self.scratch, prefix="cache-"))

    def _process(self, order: dict[str, Any], cache: Path) -> dict[str, Any]:
        order |= {"threads": self.arguments.threads, "scratch": str(self.scratch / "trainer")}
        file = self.scratch / "order.json"
        file.write_text(json.dumps(order))
        threads = {"OMP_NUM_THREADS": str(self.arguments.threads)} if self.arguments.threads else {}
        environment = {
            **os.environ, **threads, "ALIGNLAB_CACHE": str(cache / "alignlab"), "HF_DATASETS_CACHE": str(cache / "hf"),
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        command = [sys.executable, str(HERE / "bench_side.py"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-12:]))
        return json.loads(done.stdout.splitlines()[-1])


def measure(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything, from the model folder to the report."""
    import torch

    gpu = torch.cuda.is_available()
    model = model_folder(given, scratch)
    bench = Bench(given, model, scratch)
    with mock.patch.dict(os.environ, ALIGNLAB_CACHE=str(scratch / "rows-cache")):
        files = bench_rows.make(
            given.data, given.objective, model, scratch / "rows", batch=given.batch, steps=given.steps,
            max_length=given.max_length, seed=given.seed,
        )  # fmt: skip
    first, second = bench_cases.sides(given, files)
    tried: list[dict[str, Any]] = []
    if second.program == "trl" and given.trl == "best":
        second, tried = bench_cases.search(bench, second, gpu)
    steps = {first.name: given.steps, second.name: given.steps}
    if second.program == "trl" and given.trl == "packed":
        second, steps[second.name] = bench_cases.packed(bench, second)
    both = [bench_cases.with_cache(side, given.cached) for side in (first, second)]
    for side in both:
        if side.keeps_cache:
            say(f"first job: {side.name}")
            bench.run(side, given.steps, prepare_only=True)
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in both}
    rates = []
    for number in range(given.pairs):
        rates.append(bench.matmul_rate())
        for side in both if number % 2 == 0 else reversed(both):
            found = bench.run(side, steps[side.name])
            runs[side.name].append(found)
            say(f"pair {number + 1}: {side.name} {found['whole']['wall']:.1f} s, {found['whole']['cpu']:.1f} cpu s")
    settings = {
        key: getattr(given, key)
        for key in (
            "objective", "model", "layers", "trl", "cached", "micro_batch", "batch", "steps", "max_length", "dtype",
            "learning_rate", "seed", "option",
        )
    }  # fmt: skip
    settings |= {"model": shown(given.model), "data": given.data.name, "against": second.name}
    settings["left_out"] = files.left_out
    return bench_report.report(
        settings, (first.name, second.name), runs, rates=rates, gpu=gpu, search=tried,
        second_settings={"micro_batch": second.micro_batch, **second.trl},
        machine=bench_report.machine(given.threads or torch.get_num_threads()),
        command=" ".join(["scripts/bench.py", *map(shown, sys.argv[1:])]),
    )  # fmt: skip


def model_folder(given: argparse.Namespace, scratch: Path) -> Path:
    """The model both sides load, in float32, cut to its first layers where asked, with the head that is trained."""
    import torch

    from alignlab.config import ModelConfig
    from alignlab.equivalence.cut import first_layers
    from alignlab.models.load import load_model

    config = ModelConfig(name_or_path=given.model)
    head = "scalar" if given.objective in ("reward", "tree") else "lm"
    text = load_model(config, head, torch.float32, given.seed).model.config.get_text_config()
    folder = scratch / "model"
    first_layers(config, head, given.layers or text.num_hidden_layers, given.seed, folder)
    return folder


def shown(argument: str) -> str:
    """An argument of the command line as it may stand in a report: a path by its name."""
    return Path(argument).name if "/" in argument else argument


def add_shared(parser: argparse.ArgumentParser, steps: int) -> None:
    """What every measurement of a training takes."""
    parser.add_argument("--objective", help="of alignlab")
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a folder")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--data", type=Path, help="rows in any format that alignlab reads")
    parser.add_argument("--micro-batch", type=int, help="examples in a micro-batch, on every side")
    parser.add_argument("--batch", type=int, default=16, help="examples in an optimizer step")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of alignlab's run")
    parser.add_argument("--json", type=Path, help="write the whole result there")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what does not go together ends here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared(parser, steps=3)
    parser.add_argument("--against", choices=("trl", "sft", "flat"), help="the second side; follows from the objective")
    parser.add_argument("--trl", choices=("defaults", "best", "packed"), default="best")
    parser.add_argument("--cached", choices=("none", "ours", "both"), default="none")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--search-steps", type=int, default=1)
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="only print these results as Markdown")
    given = parser.parse_args(arguments)
    if not given.table and not (given.objective in OBJECTIVES and given.data):
        parser.error(f"--objective ({', '.join(OBJECTIVES)}) and --data are needed, or --table")
    known = {"ift": "sft", "tree": "flat"}.get(given.objective, "trl")
    if given.against not in (None, known):
        parser.error(f"--objective {given.objective} is compared with {known}")
    if given.trl == "packed" and given.objective != "sft":
        parser.error("--trl packed: only TRL's SFT trainer packs")
    if known != "trl" and given.cached != "none":
        parser.error(f"--cached: the objective {given.objective} caches nothing")
    given.against = known
    return given


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    if given.table:
        print(bench_report.table([json.loads(file.read_text()) for file in given.table]))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        try:
            found = measure(given, Path(scratch))
        except RuntimeError as error:
            raise SystemExit(f"a side failed:\n{error}") from None
        except AlignlabError as error:
            raise SystemExit(f"{given.data}: {error}") from None
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(bench_report.table([found]))


if __name__ == "__main__":
    main(sys.argv[1:])
