"""Where recipes are: one folder each, ``toy.yaml``, ``small.yaml``, ``paper.yaml`` inside, and ``expected.json``."""

from __future__ import annotations

import difflib
from pathlib import Path

from alignlab.errors import ConfigError

SCALES = ("toy", "small", "paper")
EXPECTED = "expected.json"


def home() -> Path:
    """The recipes that come with alignlab: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent
    return here / "files" if (here / "files").is_dir() else here.parents[1] / "recipes"


def names() -> list[str]:
    """The recipes that come with alignlab."""
    if not home().is_dir():
        return []
    return sorted(path.name for path in home().iterdir() if scales(path))


def scales(recipe: Path) -> list[str]:
    """The scales that a recipe's folder holds."""
    return [scale for scale in SCALES if (recipe / f"{scale}.yaml").is_file()]


def find(word: str) -> Path:
    """The folder of a recipe by name, or the folder that ``word`` itself is; :class:`ConfigError` for neither."""
    known = names()
    if word in known:
        return home() / word
    path = Path(word).expanduser()
    if scales(path):
        return path.resolve()
    if path.is_dir():
        raise ConfigError(f"{path}: holds no {', '.join(f'{scale}.yaml' for scale in SCALES)}, so it is no recipe")
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}; or give a recipe's folder"
    raise ConfigError(f"no such recipe: {word} ({hint})")


def file_of(recipe: Path, scale: str) -> Path:
    """The file of one scale; :class:`ConfigError` names those that are there."""
    if scale not in SCALES:
        raise ConfigError(f"scale={scale}: known are {', '.join(SCALES)}")
    if scale not in scales(recipe):
        raise ConfigError(f"{recipe.name}: has no scale '{scale}' (it has {', '.join(scales(recipe))})")
    return recipe / f"{scale}.yaml"
