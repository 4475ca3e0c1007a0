"""What a run is called: the same for the same numbers, on any machine and from any folder.

The default name ends in a hash of every key that can change a number.  Local files enter by their contents and base
name, so an edited file is another run and a moved one is not; what only changes speed or how often something is
written stays out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration import schema

SPEED_KEYS = (
    "engine.",
    "launch.",
    "logger.",
    "run.",
    "debug.",
    "model.layout",
    "data.num_proc",
    "model.use_liger_kernel",
    "train.token_budget",
    "train.per_device_train_batch_size",
    "train.gradient_checkpointing",
    "train.torch_compile",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.export_steps",
    "train.logging_steps",
    "eval.batch_size",
    "eval.prompt",
    "eval.temperature",
    "eval.top_p",
    "eval.num_samples",
    "eval.backend",
    "reference.compute",
    "output_dir",
    "resume",
    "resume_allow",
    "overwrite",
)
"""Keys (or, with a dot at the end, sections) that never change a number beyond tolerance."""

BUILT_IN = ("tiny", "smollm2", "sums")

WHOLE_FILE = 64 * 2**20
"""Weight files above this many bytes are identified by their size and evenly spread pieces."""
PIECES, PIECE = 64, 2**16


def run_name(config: RootConfig) -> str:
    """``run.name`` where the user gave one, else ``objective-model-data-<8 hex of number_keys>``."""
    if config.run.name is not None:
        return config.run.name
    return default_name(config)


def default_name(config: RootConfig) -> str:
    """The name of the numbers that ``config`` stands for."""
    return prefix(config) + digest(number_keys(config))[:8]


def prefix(config: RootConfig) -> str:
    """``objective-model-data-``: the readable part of the default name."""
    source = config.data.path or (config.data.sources[0].path if config.data.sources else "nodata")
    mixed = f"-and-{len(config.data.sources) - 1}" if len(config.data.sources) > 1 else ""
    parts = (
        _slug(config.objective.name if config.objective is not None else "none", 14),
        _slug(_base_name(config.model.name_or_path, ("model",)), 22),
        _slug(_base_name(source, ()) + mixed, 14),
    )
    return "-".join(parts) + "-"


def beside_runs(config: RootConfig, kind: str, content: Callable[[], dict[str, Any]]) -> Path:
    """``<kind>/<name>`` beside ``output_dir``: the user's ``run.name``, else a name made from ``content()``."""
    name = config.run.name if config.run.name is not None else prefix(config) + digest(content())[:8]
    return Path(os.path.expanduser(config.output_dir)).parent / kind / name


def digest(values: dict[str, Any]) -> str:
    """SHA-256 (hex) of dotted keys and plain values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def number_keys(config: RootConfig) -> dict[str, Any]:
    """The keys that can change a number, local files replaced by what identifies their contents."""
    return {key: _identified(key, value) for key, value in stated_keys(config).items()}


def stated_keys(config: RootConfig) -> dict[str, Any]:
    """The keys that can change a number, as the user stated them."""
    flat = schema.flatten(config)
    kept = {key: value for key, value in flat.items() if not is_speed(key)}
    if kept.get("data.merge_prompts") in ("true", "false"):
        del kept["data.merge_prompts"]
    if kept.get("data.leaks") in ("error", "keep"):  # the same rows train, or none
        del kept["data.leaks"]
    return kept


def is_speed(key: str) -> bool:
    """Whether a key never changes a number beyond tolerance."""
    return any(key.startswith(speed) if speed.endswith(".") else key == speed for speed in SPEED_KEYS)


def _identified(key: str, value: Any) -> Any:
    if key in ("data.path", "data.eval_path", "eval.probe_path", "model.chat_template") and isinstance(value, str):
        return identify(value)
    if key in ("model.name_or_path", "model.tokenizer_name_or_path", "reference.name_or_path") and value is not None:
        return identify(value)
    if key == "data.sources":
        return [{**source, "path": identify(source["path"])} for source in value]
    if key == "plugins":
        return [identify(path) for path in value]
    return value


def identify(name: str) -> str:
    """A local file or folder as base name and hash of its contents; anything else (a hub name) as it is."""
    if name in BUILT_IN or not _exists(name):
        return name
    path = Path(name).resolve()
    whole = hashlib.sha256()
    for file in _files(path):
        whole.update(f"{file.relative_to(path) if path.is_dir() else ''}\0".encode("utf-8", "surrogateescape"))
        whole.update(_contents(file))
    return f"{path.name}#{whole.hexdigest()}"


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a chat template's text is no path
        return False


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            yield file


def _contents(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_FILE or file.suffix not in (".safetensors", ".bin", ".pt", ".gguf"):
            return hashlib.file_digest(stream, "sha256").digest()
        found = hashlib.sha256(str(size).encode())
        for piece in range(PIECES):
            stream.seek((size - PIECE) * piece // (PIECES - 1))
            found.update(stream.read(PIECE))
        return found.digest()


def _base_name(name: str, generic: tuple[str, ...]) -> str:
    """The telling part of a path or hub name: the last one, or the one above a folder that is just ``model``."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..", "~")] or ["unnamed"]
    if parts[-1] in generic and len(parts) > 1:
        return parts[-2]
    return re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", parts[-1])


def _slug(text: str, length: int) -> str:
    """Lower-case letters, digits, ``.`` and ``_``; everything else becomes ``-``."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower())[:length].strip("-._") or "unnamed"
