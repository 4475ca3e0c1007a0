"""What is installed is what is here: every package and every YAML file."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_the_list_of_packages_is_complete() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "alignlab").rglob("__init__.py")}
    assert listed == here | {"alignlab.conf", "alignlab.recipes.files"}


def test_a_wheel_holds_the_configuration_files(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="building a wheel without isolation needs setuptools")
    for name in ("pyproject.toml", "README.md", "alignlab", "conf", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "out", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"alignlab/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    recipes = [
        path for path in (ROOT / "recipes").rglob("*.*") if path.suffix in (".yaml", ".json", ".py", ".md", ".jinja")
    ]
    wanted |= {f"alignlab/recipes/files/{path.relative_to(ROOT / 'recipes')}" for path in recipes}
    assert wanted <= held
    assert "alignlab/verbs/show.py" in held
