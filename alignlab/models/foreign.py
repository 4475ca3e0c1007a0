"""What a model folder asks for before anything of it is loaded: weights that are no program, and no code of its own.

The folder may come from anybody.  transformers would follow it to pickled weights, to an adapter's base model, and to
attention kernels that are downloaded and run; each is refused here, by the name of the file that asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from alignlab.errors import ConfigError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
INDEX = "model.safetensors.index.json"


def check_folder(folder: Path, *, weights: bool) -> None:
    """Raise :class:`ConfigError` for a model folder that cannot be loaded without running what it holds.

    ``weights``: the weight files have to be there.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ConfigError(
            f"model: {adapter}: an adapter, not a model; it would choose the base model itself. Merge it first "
            "(alignlab writes the merged model to <run>/model)"
        )
    config = folder / "config.json"
    if config.is_file():
        for key, value in _implementations(_object(config)):
            raise ConfigError(f"model: {config}: {key}: {value!r} names code on the hub; remove the key")
    index = folder / INDEX
    if index.is_file():
        for name in set(_object(index).get("weight_map", {}).values()):
            if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
                raise ConfigError(f"model: {index}: weight file {name!r} is no .safetensors file of this folder")
    if weights and not any(folder.glob("*.safetensors")):
        pickled = sorted(path for pattern in PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ConfigError(
                f"model: {pickled[0]}: weights in this format can run code when they are loaded and are never read; "
                "convert them to .safetensors"
            )


def broken_file(folder: Path) -> Path | None:
    """The first file of a model folder that is not the JSON or safetensors it should be; read to explain a failure."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return path
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return path
    return None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model: {path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"model: {path}: not a JSON object")
    return found


def _implementations(value: Any, inside: bool = False) -> Iterator[tuple[str, Any]]:
    """(key, value) of every ``..._implementation...`` entry that could name a hub repository, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            named = inside or "implementation" in key
            if named and isinstance(item, str) and ("/" in item or ":" in item):
                yield key, item
            yield from _implementations(item, named)
    elif isinstance(value, list):
        for item in value:
            yield from _implementations(item, inside)
