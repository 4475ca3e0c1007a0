"""The files under ``conf/``: where they are, what options they offer, and Hydra's composition of the chosen ones.

The only file that composes with Hydra.  It sees names of options and nothing a user wrote.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig, SourceConfig
from alignlab.configuration import yamlio
from alignlab.configuration.settings import GROUPS, Setting, spread
from alignlab.errors import ConfigError
from alignlab.registry import OBJECTIVES


def conf_folder() -> Path:
    """Where the YAML files are: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parents[1]
    return here / "conf" if (here / "conf" / "config.yaml").exists() else here.parent / "conf"


@cache
def options(group: str) -> tuple[str, ...]:
    """The names a group can be set to (for objectives: every registered one)."""
    if group == "objective":
        return tuple(OBJECTIVES.names())
    return tuple(sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")))


@cache
def option_values(group: str, option: str) -> dict[str, Any]:
    """The keys that one option's file sets, in dotted form."""
    path = conf_folder() / group / f"{option}.yaml"
    if not path.exists():
        return {}
    content = yamlio.load(path) or {}
    content.pop("defaults", None)
    everywhere = path.read_text(encoding="utf-8").startswith("# @package _global_")
    whole = content if everywhere else {group: content}
    return {s.key: s.raw for s in spread([Setting(key, value, False, "") for key, value in whole.items()])}


def named_source(entry: Any) -> Any:
    """An entry of ``data.sources`` whose path names an option of ``data``: the option's words under the entry's own.

    Raises :class:`ConfigError` for an option that is a mixture or conditions its rows: no single source can be that.
    """
    name = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(name, str) or name not in options("data"):
        return entry
    said = {key.removeprefix("data."): value for key, value in option_values("data", name).items()}
    if "path" not in said:
        raise ConfigError(f"{name} is a mixture itself; choose it with data={name}")
    known = {field.name for field in dataclasses.fields(SourceConfig)}
    return {**{key: value for key, value in said.items() if key in known}, **entry, "path": said["path"]}


def composed(chosen: frozenset[tuple[str, str]]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """(nested values, the option of every group) when ``chosen`` options are taken over the defaults."""
    content, picked = _composed(chosen)
    return copy.deepcopy(content), dict(picked)


@cache
def _composed(chosen: frozenset[tuple[str, str]]) -> tuple[dict[str, Any], dict[str, str | None]]:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # An objective from outside has no file; its section comes from its dataclass alone.
    overrides = [
        f"{group}={option}" for group, option in sorted(chosen) if (conf_folder() / group / f"{option}.yaml").exists()
    ]
    ConfigStore.instance().store(name="schema", node=RootConfig)
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="alignlab"):
            whole = compose("config", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"conf: {' '.join(str(error).split())}") from None
    finally:
        HydraConfig.instance().cfg = None
    picked = {group: whole.hydra.runtime.choices.get(group) for group in GROUPS}
    everything: Any = OmegaConf.to_container(whole, resolve=False)
    del everything["hydra"]
    return everything, picked
