"""One entry of a mapping that others read too, such as the environment, set for a while."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def temporary_entry(mapping: MutableMapping[str, Any], key: str, value: Any) -> Iterator[None]:
    """``mapping[key]`` is ``value`` inside the block, and what it was, or absent, behind it.

    All other entries stay as the block leaves them: what is imported while one of ``sys.modules`` is hidden, is kept.
    """
    before = mapping.get(key, _ABSENT)
    mapping[key] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            mapping.pop(key, None)
        else:
            mapping[key] = before
