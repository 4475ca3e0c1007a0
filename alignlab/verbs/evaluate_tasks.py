"""``alignlab evaluate RUN tasks=gsm8k,arc_easy``: the exported folder, handed to EleutherAI's lm-eval harness.

The harness (extra ``lm-eval``) runs in a process of its own, as ``python -m lm_eval run --config FILE``; its figures
come back, with its account of how it measured.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.configuration import names
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError, Preempted
from alignlab.models.load import resolve_dtype
from alignlab.models.source import model_folder
from alignlab.processes import call
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder
from alignlab.verbs.options import own_options

MODULE = "lm_eval"


@dataclass
class Options:
    """The verb's own settings for the harness."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks or groups, as `lm-eval ls tasks` lists them."""


@dataclass
class TasksConfig:
    """How the harness runs them; set as ``tasks.<name>``."""

    include_path: str | None = None
    """A folder with tasks of one's own (YAML; they may name Python beside them, which runs)."""
    num_fewshot: int | None = None
    """Examples before each question; default: the task's own number."""
    limit: int | None = None
    """Only the first rows of each task: for a trial, not for a figure."""
    chat_template: bool = True
    """Ask through the model's chat template, where it has one; models that were trained on plain text want false."""


def run(request: Request, config: RootConfig, folder: RunFolder | None) -> int:
    """Print the table; JSON and the run's ``eval/lm-eval-<8 hex>.json`` hold the harness's whole result."""
    tasks = [name.strip() for word in own_options(request, Options).tasks for name in word.split(",") if name.strip()]
    settings = own_options(request, TasksConfig, "tasks.")
    _check(tasks, settings)
    source = model_folder(config.model)
    said = _settings(config, settings, tasks, source)
    print(f"lm-eval  {', '.join(tasks)} on {source}", flush=True)
    with TemporaryDirectory() as place:
        log = (folder.eval if folder else Path(place)) / "lm-eval.txt"
        log.parent.mkdir(exist_ok=True)
        found = _harness(said, Path(place), log)
    for task, metric, value, error in _figures(found):
        print(f"{task:<32} {metric:<24} {value:.4f}{'' if error is None else f' +- {error:.4f}'}")
    result = {"model": source, "tasks": tasks, "settings": asdict(settings), **found}
    if folder is not None:
        path = folder.eval / f"lm-eval-{names.digest(_identity(said, config, settings))[:8]}.json"
        write_atomic(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written  {path}")
    emit(request, result)
    return 0


def _check(tasks: list[str], settings: TasksConfig) -> None:
    problems = []
    if not tasks:
        problems.append("tasks: name at least one, e.g. tasks=gsm8k,arc_easy")
    if settings.include_path is not None and not Path(settings.include_path).expanduser().is_dir():
        problems.append(f"tasks.include_path: no such folder: {settings.include_path}")
    if settings.limit is not None and settings.limit < 1:
        problems.append(f"tasks.limit: {settings.limit} (expected 1 or more)")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        problems.append(f"tasks.num_fewshot: {settings.num_fewshot} (expected 0 or more)")
    if problems:
        raise ConfigError("\n".join(f"evaluate: {problem}" for problem in problems))
    if importlib.util.find_spec(MODULE) is None:
        raise ConfigError("evaluate tasks= needs lm-eval: pip install 'alignlab[lm-eval]'")


def _settings(config: RootConfig, settings: TasksConfig, tasks: list[str], source: str) -> dict[str, Any]:
    """What the harness is told, in its own words."""
    device = dist.device()
    model = {
        "pretrained": source,
        "dtype": str(resolve_dtype(config.model.dtype, device)).removeprefix("torch."),
        "trust_remote_code": config.model.trust_remote_code,
    }
    if config.model.tokenizer_name_or_path is not None:
        model["tokenizer"] = config.model.tokenizer_name_or_path
    said: dict[str, Any] = {
        "model": "hf",
        "model_args": model,
        "tasks": tasks,
        "batch_size": config.eval.batch_size,
        "device": device.type,
        "seed": [config.seed] * 4,
        "apply_chat_template": settings.chat_template and _has_template(Path(source)),
    }
    if settings.include_path is not None:
        said["include_path"] = str(Path(settings.include_path).expanduser().resolve())
    return said | {k: v for k, v in (("num_fewshot", settings.num_fewshot), ("limit", settings.limit)) if v is not None}


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and bool(said.get("chat_template"))


def _harness(said: dict[str, Any], place: Path, log: Path) -> dict[str, Any]:
    """Run it; what it wrote, as it wrote it.  What it printed goes to ``log``."""
    file, out = place / "lm-eval.yaml", place / "out"
    file.write_text(json.dumps({**said, "output_path": str(out)}), encoding="utf-8")  # JSON is YAML
    with log.open("wb") as stream:
        command = [sys.executable, "-m", MODULE, "run", "--config", str(file)]
        # Unbuffered, or what went to standard output before an error would stand behind it in the log.
        code = call(command, {"PYTHONUNBUFFERED": "1"}, stdout=stream, stderr=subprocess.STDOUT)
    written = sorted(out.rglob("results_*.json"))
    if code == Preempted.exit_code:
        raise Preempted("evaluate tasks=: stopped; nothing is kept of a harness that has not ended")
    if code or not written:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "it printed nothing")
        kept = "" if log.is_relative_to(place) else f" (all it said: {log})"
        raise ConfigError(f"lm-eval ended with {code}: {last[:300]}{kept}")
    found: dict[str, Any] = json.loads(written[-1].read_text(encoding="utf-8"))
    return found


def _figures(found: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error) of everything that the harness measured."""
    for task, measured in found.get("results", {}).items():
        for name, value in measured.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                error = measured.get(f"{metric}_stderr,{filtered}")
                label = metric if filtered == "none" else f"{metric} ({filtered})"
                yield task, label, float(value), float(error) if isinstance(error, int | float) else None


def _identity(said: dict[str, Any], config: RootConfig, settings: TasksConfig) -> dict[str, Any]:
    model = {**said["model_args"], "pretrained": names.identify(said["model_args"]["pretrained"])}
    included = settings.include_path and names.identify(settings.include_path)
    return {**said, "model_args": model, "include_path": included, "seed": config.seed}
