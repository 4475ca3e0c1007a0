"""Plug-ins: one file outside the repository, its schema from its dataclass, its copy in the run folder."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from alignlab import registry as registries
from alignlab.configuration import plugins
from alignlab.configuration.compose import compose
from alignlab.configuration.frozen import frozen_text
from alignlab.errors import ConfigError

MINE = """
    from __future__ import annotations
    from dataclasses import dataclass
    from alignlab.objectives.sft import SFT
    from alignlab.registry import register_format, register_objective

    @dataclass
    class MineConfig:
        strength: float = 0.5
        modes: list[str] | None = None

    @register_objective
    class Mine(SFT):
        name = "{name}"
        Config = MineConfig

    @register_format("{name}_rows")
    def rows(row):
        raise NotImplementedError
"""


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in (registries.OBJECTIVES, registries.FORMATS, registries.VERIFIERS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def write(folder: Path, name: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(MINE.format(name=name)))
    return path


def test_an_objective_from_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, "mine_a")
    base = [f"plugins=[{path}]", "objective=mine_a", "model=tiny", "data=sums"]
    made = compose([*base, "objective.strength=0.7", "objective.modes=[x]"])
    assert (made.config.objective.name, made.config.objective.strength) == ("mine_a", 0.7)
    assert made.config.objective.modes == ["x"]
    with pytest.raises(ConfigError, match=r"objective\.strength"):
        compose([*base, "objective.strenght=1"])
    with pytest.raises(ConfigError, match="a number"):
        compose([*base, "objective.strength=many"])


def test_the_copy_serves_the_workers_and_the_frozen_file(tmp_path: Path) -> None:
    path = write(tmp_path, "mine_b")
    run = tmp_path / "run"
    run.mkdir()
    made = compose([f"plugins={path}", "objective=mine_b", "model=tiny", "data=sums"])
    plugins.copy(made.plugins, run / "plugins")
    (run / "run.yaml").write_text(frozen_text(made.config, made.provenance))
    path.unlink()
    script = (
        "import sys; from pathlib import Path\n"
        "from alignlab.configuration.compose import compose\n"
        "from alignlab.configuration.frozen import load_frozen\n"
        "folder = Path(sys.argv[1])\n"
        "assert load_frozen(folder).objective.name == 'mine_b'\n"
        "assert compose(file=folder / 'run.yaml').config == load_frozen(folder)"
    )
    subprocess.run([sys.executable, "-c", script, str(run)], check=True, cwd=tmp_path)
    assert list(json.loads((run / "plugins" / "plugins.json").read_text())) == ["mine_b.py"]
    (run / "plugins" / "mine_b.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="changed since"):
        plugins.load_copies(run / "plugins")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import nothing_like_this", r"bad\.py: line 1: ModuleNotFoundError"),
        ("x = 1\ny = (", r"bad\.py: line 2: SyntaxError"),
        ("\n\nraise ValueError('no')", "line 3: ValueError: no"),
        ("from alignlab.registry import OBJECTIVES\nOBJECTIVES.add('dpo', 1)", "registered already"),
    ],
)
def test_broken_files_are_named_with_their_line(code: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(code)
    with pytest.raises(ConfigError, match=word):
        compose([f"plugins=[{path}]", "objective=dpo", "model=tiny", "data=sums"])


def test_missing_files_and_other_things(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        compose(["plugins=[./nowhere.py]", "objective=dpo"])
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ConfigError, match="not a Python file"):
        compose([f"plugins={tmp_path / 'x.txt'}", "objective=dpo"])


def test_recipes_cannot_bring_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from alignlab.configuration import groups

    shutil.copytree(groups.conf_folder(), tmp_path / "conf")
    (tmp_path / "conf" / "recipe" / "evil.yaml").write_text("# @package _global_\nplugins: [./evil.py]\n")
    (tmp_path / "conf" / "recipe" / "remote.yaml").write_text("# @package _global_\nmodel: {trust_remote_code: true}\n")
    monkeypatch.setattr(groups, "conf_folder", lambda: tmp_path / "conf")
    for cached in (groups.options, groups.option_values, groups._composed):
        cached.cache_clear()
    try:
        for recipe in ("evil", "remote"):
            with pytest.raises(ConfigError, match="only"):
                compose([f"recipe={recipe}", "objective=dpo", "model=tiny", "data=sums"])
    finally:
        monkeypatch.undo()
        for cached in (groups.options, groups.option_values, groups._composed):
            cached.cache_clear()


def test_decorators_work_bare_and_with_a_name() -> None:
    @registries.register_format
    def bare_rows(row: dict[str, object]) -> None: ...

    @registries.register_format("named_rows")
    def other(row: dict[str, object]) -> None: ...

    @registries.register_verifier
    def bare_check(verify: dict[str, object], text: str) -> dict[str, float]:
        return {}

    @registries.register_objective("named_objective")
    class Mine:
        pass

    assert registries.FORMATS.get("bare_rows") is bare_rows
    assert registries.FORMATS.get("named_rows") is other
    assert registries.VERIFIERS.get("bare_check") is bare_check
    assert registries.OBJECTIVES.get("named_objective") is Mine
    assert Mine.name == "named_objective"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="registered already"):
        registries.register_format("named_rows")(bare_rows)
