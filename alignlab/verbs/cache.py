"""``alignlab cache ls`` and ``alignlab cache rm KIND [KEY]``: what is costly to make and is made once."""

from __future__ import annotations

import time

from alignlab.data import cache
from alignlab.errors import ConfigError
from alignlab.request import Request, emit


def run(request: Request) -> int:
    """List the entries, or remove some; a key may be shortened to its first characters."""
    words = request.words or ["ls"]
    if words[0] == "ls" and len(words) == 1:
        return _list(request)
    if words[0] == "rm" and 2 <= len(words) <= 3:
        return _remove(request, words[1], words[2] if len(words) == 3 else None)
    raise ConfigError("cache: expected 'cache ls', 'cache rm KIND', 'cache rm KIND KEY' or 'cache rm all'")


def _list(request: Request) -> int:
    entries = cache.listing()
    for entry in entries:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
        print(f"{entry.kind:<12} {entry.key[:16]:<16} {size(entry.size):>10}  {made}")
    total = sum(entry.size for entry in entries)
    print(f"{cache.root()}: {len(entries)} entries, {size(total)}")
    emit(
        request,
        {
            "path": str(cache.root()),
            "bytes": total,
            "entries": [{"kind": e.kind, "key": e.key, "bytes": e.size, "path": str(e.path)} for e in entries],
        },
    )
    return 0


def _remove(request: Request, kind: str, key: str | None) -> int:
    kinds = sorted({entry.kind for entry in cache.listing()})
    if kind != "all" and kind not in kinds:
        raise ConfigError(f"cache rm: no entries of kind '{kind}'; there are {', '.join(kinds) or 'none'} (or all)")
    freed = cache.remove(None if kind == "all" else kind, key)
    print(f"{size(freed)} freed")
    emit(request, {"freed": freed})
    return 0


def size(number: float) -> str:
    """Bytes for people: 1.4 GB."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
