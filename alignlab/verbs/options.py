"""What verbs share: their own keys, which no configuration has, and what a measurement's file is called."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, TypeVar

from alignlab.config import RootConfig
from alignlab.configuration import names, schema
from alignlab.configuration.checks import looks_secret
from alignlab.errors import ConfigError
from alignlab.request import Request

T = TypeVar("T")


def own_options(request: Request, kind: type[T], prefix: str = "") -> T:
    """An instance of the dataclass ``kind``, its fields set as ``<prefix><field>``.

    ConfigError names every value that its type does not take, or that looks like a secret.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, wanted in typing.get_type_hints(kind).items():
        key = f"{prefix}{name}"
        if key not in request.own:
            continue
        raw: Any = request.own[key]
        if looks_secret(str(raw)):
            problems.append(f"{key}: looks like a token or a password; put it into the environment")
            continue
        try:
            values[name] = schema.coerce(schema.from_text(raw, wanted) if isinstance(raw, str) else raw, wanted)
        except (ValueError, ConfigError) as error:
            problems.append(f"{key}: {raw} (expected {error})")
    if problems:
        raise ConfigError("\n".join(problems))
    return kind(**values)


def measurement_name(config: RootConfig, what: str, said: dict[str, Any]) -> str:
    """``<rows>-<what>-<8 hex>`` of the rows' contents, how they are read, and everything else that was ``said``."""
    source = config.data.eval_path or config.data.path or "mixture"
    options = {k: v for k, v in schema.flatten(config).items() if k.startswith(("data.", "eval."))} | said
    digest = names.digest({"rows": names.identify(source), "options": options})
    return f"{Path(source).name.split('.')[0]}-{what}-{digest[:8]}"
