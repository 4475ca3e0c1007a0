"""Imports of what is heavy: torch and transformers take seconds, and a part of that can be saved."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Keep the garbage collector out of imports, and what was imported out of the garbage collector.

    Imports make half a million objects that stay.  The collector would walk through all of them again and again, while
    they are made (a sixth of an import's time) and later, in the middle of a step.  Everything that exists when the
    block ends is left out of its walks until :func:`collectable` puts it back.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.freeze()
            gc.enable()


@contextmanager
def collectable() -> Iterator[None]:
    """After the block everything is collected as ever: a caller's own cycles must not stay for good."""
    try:
        yield
    finally:
        gc.unfreeze()
