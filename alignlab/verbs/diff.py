"""``alignlab diff RUN_A RUN_B``: what two runs differ in, and the first step and sample at which they part.

Exit codes as of diff(1): 0 the same, 1 they differ, 2 trouble.  Two runs are the same if they stand for the same
numbers: what only changes speed, versions, hosts and who set a key are shown and do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alignlab.configuration import yamlio
from alignlab.configuration.schema import plain
from alignlab.errors import ConfigError
from alignlab.request import Request, emit
from alignlab.rundiff import TOLERANCE, Pair, Run, RunDiff, difference
from alignlab.verbs.ledger import sample_text

USAGE = f"diff RUN_A RUN_B [tolerance={TOLERANCE:g}]"
LISTED = 3
"""Samples of each side, and figures that part at one step, on the screen; ``--json`` has all."""


def run(request: Request) -> int:
    """Print the differences section by section; 0 where there is none that counts, else 1."""
    one, other, tolerance = _asked(request)
    found = difference(one, other, tolerance)
    print(f"diff     {one.name}   {other.name}   (figures: within {tolerance:g})")
    for head, text in _lines(one, other, found):
        print(f"{head:<8} {text}")
    emit(request, {"runs": [one.name, other.name], "tolerance": tolerance, **as_json(found)})
    return 0 if found.same else 1


def _asked(request: Request) -> tuple[Run, Run, float]:
    words = [*request.words, *(f"{key}={value}" for key, value in request.settings.items())]
    options = [word for word in words if word.startswith("tolerance=")]
    runs = [word for word in words if word not in options]
    if len(runs) != 2 or len(options) > 1:
        raise ConfigError(f"diff: takes two runs, not {len(runs)}; {USAGE}")
    text = options[0].partition("=")[2] if options else str(TOLERANCE)
    try:
        tolerance = float(text)
    except ValueError:
        tolerance = math.nan
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"diff: tolerance={text} (expected a number, 0 or more); {USAGE}")
    return Run(runs[0]), Run(runs[1]), tolerance


def _lines(one: Run, other: Run, found: RunDiff) -> Iterator[tuple[str, str]]:
    for head, section in (("numbers", found.numbers), ("speed", found.speed)):
        for key, values in section.items():
            yield head, _between(key, [f"{_short(v)}{_who(w)}" for v, w in zip(values, found.set_by[key], strict=True)])
    for head, section in (("model", found.model), ("data", found.data), ("versions", found.versions)):
        for key, values in section.items():
            yield head, _between(key, map(_short, values))
    if found.steps[0] != found.steps[1]:
        yield "steps", f"{found.steps[0]:,}   {found.steps[1]:,}"
    yield from _stream_lines(one, other, found)
    for text in found.unread:
        yield "unread", text
    yield from _figure_lines(found)
    yield "result", "the same" if found.same else "they differ"


def _stream_lines(one: Run, other: Run, found: RunDiff) -> Iterator[tuple[str, str]]:
    parted = found.stream
    if parted is not None:
        yield "samples", f"part at step {parted.step:,}"
        for run, only in zip((one, other), parted.only, strict=True):
            for sample in only[:LISTED]:
                yield "", f"only in {run.name}:{sample_text(sample)}"
            if len(only) > LISTED:
                yield "", f"and {len(only) - LISTED:,} more of that step"
    elif one.ledger is not None and other.ledger is not None:
        both = len({*one.ledger.numbers.tolist()} & {*other.ledger.numbers.tolist()})
        yield "samples", f"the same in all {both:,} steps that both have"


def _figure_lines(found: RunDiff) -> Iterator[tuple[str, str]]:
    if not found.metrics:
        yield "figures", f"all {found.compared:,} that both have at the same step are within the tolerance"
    for point in found.metrics[:LISTED]:
        a, b = point.values
        yield "figures", f"{point.name} parts at step {point.step:,}: {a:.6g}   {b:.6g}   ({point.relative:.2g} apart)"
    if len(found.metrics) > LISTED:
        yield "", f"and {len(found.metrics) - LISTED:,} more, later or of that step"
    if found.pair is not None:
        a, b = found.pair.margins
        yield (
            "pair",
            f"{found.pair.sample} is the first whose margin parts, at step {found.pair.step:,}: {a:.6g}   {b:.6g}",
        )


def as_json(found: RunDiff) -> dict[str, Any]:
    """All of it as plain JSON."""
    return {
        "same": found.same,
        "numbers": _keys_json(found.numbers, found),
        "speed": _keys_json(found.speed, found),
        **{name: {k: list(v) for k, v in getattr(found, name).items()} for name in ("model", "data", "versions")},
        "steps": list(found.steps),
        "samples": None if found.stream is None else {"step": found.stream.step, "only": list(found.stream.only)},
        "unread": found.unread,
        "figures": [{"step": p.step, "name": p.name, "values": list(p.values), "relative": _finite(p.relative)}
                    for p in found.metrics],
        "compared": found.compared,
        "pair": None if found.pair is None else {**vars(found.pair), "margins": list(found.pair.margins)},
    }  # fmt: skip


def _keys_json(section: Mapping[str, Pair], found: RunDiff) -> dict[str, Any]:
    return {key: {"values": list(values), "set_by": list(found.set_by[key])} for key, values in section.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _between(key: str, values: Iterable[str]) -> str:
    return f"{key:<28} " + "   ".join(values)


def _who(name: str | None) -> str:
    return f" ({name})" if name and name != "default" else ""


def _short(value: Any) -> str:
    return "-" if value is None else yamlio.brief(plain(value))
