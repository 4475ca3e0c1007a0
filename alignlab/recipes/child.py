"""The process of a recipe's own function: ``python -m alignlab.recipes.child FILE FUNCTION FOLDER``.

Nothing heavy is imported here: the function imports what it needs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path

from alignlab.durable import write_atomic
from alignlab.errors import AlignlabError, ConfigError


def call_function(file: Path, name: str, folder: Path) -> None:
    """Call ``name`` of the recipe's file as ``folder/order.json`` says; its result goes to ``folder/answer.json``."""
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    sys.path.insert(0, str(file.parent))  # a recipe's files may import one another
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{file}: has no function {name}")
    models = {stage: Path(path) for stage, path in order["models"].items()}
    found = function(folder, models, order["seed"], **order["with"])
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: {name} returned {type(found).__name__}; expected a dict of plain JSON")
    try:
        text = json.dumps(found, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {name} returned what is no plain JSON: {error}") from None
    write_atomic(folder / "answer.json", text + "\n")


def main(words: list[str]) -> int:
    """Errors are said and counted as every alignlab command does."""
    file, name, folder = words
    try:
        call_function(Path(file), name, Path(folder))
    except AlignlabError as error:
        print(f"alignlab: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        print(f"alignlab: {Path(file).name}: {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
