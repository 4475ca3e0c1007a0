"""``alignlab ledger RUN``: which samples made a step, how often each was seen, whether two runs had the same stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignlab.data.ledger_query import Ledger, parting
from alignlab.errors import ConfigError
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder

QUESTIONS = ("step", "sample", "other")
USAGE = "ledger RUN, ledger RUN step=NUMBER, ledger RUN sample=ID, or ledger RUN other=RUN"
LISTED = 10
"""Samples of each side, and steps of a sample, that are listed on the screen; ``--json`` has all."""


def run(request: Request) -> int:
    """The account of a run, or one question to it; 1 where ``other=`` has another stream."""
    name, question, value = _asked(request)
    ledger = _open(name)
    if question is None:
        return _summary(request, name, ledger)
    if question == "step":
        return _step(request, ledger, value)
    if question == "sample":
        return _sample(request, ledger, value)
    return _other(request, name, ledger, value)


def _asked(request: Request) -> tuple[str, str | None, str]:
    words = [*request.words, *(f"{key}={value}" for key, value in request.settings.items())]
    if not words:
        raise ConfigError(f"ledger: which run? {USAGE}")
    name, *rest = words
    if not rest:
        return name, None, ""
    key, equals, value = rest[0].partition("=")
    if len(rest) > 1 or not equals or key not in QUESTIONS or not value:
        raise ConfigError(f"ledger: cannot answer '{' '.join(rest)}'; ask {USAGE}")
    return name, key, value


def _open(name: str) -> Ledger:
    folder = RunFolder(Path(name).expanduser())
    if not folder.exists:
        raise ConfigError(f"ledger: no such run: {name}")
    if not folder.ledger.is_dir():
        raise ConfigError(f"ledger: {name} has no ledger: it has not begun to train")
    return Ledger(folder.ledger)


def _summary(request: Request, name: str, ledger: Ledger) -> int:
    found = ledger.summary()
    rows, samples, seen = found["rows"], found["samples"], found["times_seen"]
    dropped = _reasons(rows["dropped"])
    print(f"ledger   {name}   {found['steps']:,} steps recorded, the last is {found['last_step']:,}")
    print(f"rows     {rows['read']:,} read = {rows['kept']:,} kept + {rows['read'] - rows['kept']:,} dropped{dropped}")
    copies = f", {samples['stored']:,} with copies" if samples["stored"] > samples["distinct"] else ""
    print(f"samples  {samples['distinct']:,}{copies}; {samples['seen']:,} seen at least once; "
          f"times seen: min {seen['min']:.3g}, median {seen['median']:.3g}, max {seen['max']:.3g}")  # fmt: skip
    print(f"tokens   {found['tokens']:,} stored, {found['supervised']:,} supervised ({_counts(found['roles'])})")
    print(f"seen     {found['tokens_in_steps']:,} tokens in steps, {found['supervised_in_steps']:,} supervised")
    if found["skipped_steps"]:
        print(f"skipped  not finite, no update: {_listed(found['skipped_steps'])}")
    if found["missing_steps"]:
        print(
            f"missing  {len(found['missing_steps']):,} steps were not recorded here: {_listed(found['missing_steps'])}"
        )
    print(f"stream   {found['stream']}")
    emit(request, {"run": name, **found})
    return 0


def _step(request: Request, ledger: Ledger, value: str) -> int:
    if not value.isdigit():
        raise ConfigError(f"ledger: step={value} is not a step's number (they count from 1)")
    found = ledger.step(int(value))
    skipped = "   SKIPPED: not finite" if found["skipped"] else ""
    print(f"step     {found['step']:,}   epoch {found['epoch']:.4g}   {found['examples']:,} examples of "
          f"{len(found['samples']):,} samples   {found['tokens']:,} tokens, {found['supervised']:,} supervised   "
          f"hash {found['hash']}{skipped}")  # fmt: skip
    for one in found["samples"]:
        print(sample_text(one))
    emit(request, found)
    return 0


def _sample(request: Request, ledger: Ledger, value: str) -> int:
    found = ledger.sample(value)
    for one in found:
        place = f"{one['file']}:{one.get('line', '?')}"
        print(f"sample   {one.get('id', '?')}   {place}   {one['status']}"
              + (f": {one['reason']}" if "reason" in one else f"   hash {one['hash']}")
              + (f" ({one['detail']})" if "detail" in one else ""))  # fmt: skip
        if one["status"] == "dropped":
            continue
        copies = f", {one['copies']} copies" if one["copies"] > 1 else ""
        print(f"tokens   {one['tokens']:,}, {one['supervised']:,} supervised ({_counts(one['roles'])}) in "
              f"{one['sequences']} sequences, {one['examples']} examples{copies}{_lost(one['lost'])}")  # fmt: skip
        where = f" in {len(one['steps']):,} steps: {_listed(one['steps'])}" if one["steps"] else ""
        print(f"seen     {one['times_seen']:.3g} times{where}")
    emit(request, {"sample": value, "found": found})
    return 0


def _other(request: Request, name: str, ledger: Ledger, value: str) -> int:
    other = _open(value)
    parted = parting(ledger, other)
    counts = (len(ledger.steps), len(other.steps))
    same = parted is None and ledger.numbers.tolist() == other.numbers.tolist()
    result: dict[str, Any] = {"same": same, "runs": [name, value], "steps": counts}
    result["streams"] = [ledger.stream, other.stream]
    if parted is not None:
        print(f"differ   first at step {parted.step:,}; the {parted.step - 1:,} before it are the same")
        for run_name, only in zip((name, value), parted.only, strict=True):
            print(f"only in  {run_name}: {len(only):,} samples of that step")
            for one in only[:LISTED]:
                print(sample_text(one))
            if len(only) > LISTED:
                print(f"  and {len(only) - LISTED:,} more (--json)")
        result |= {"first_difference": parted.step, "only": list(parted.only)}
    elif same:
        print(f"same     {counts[0]:,} steps   stream {ledger.stream}")
    else:
        print(f"differ   the same where both have steps, but {name} has {_span(ledger)} and {value} {_span(other)}")
    emit(request, result)
    return 0 if same else 1


def _span(ledger: Ledger) -> str:
    steps = ledger.numbers
    return f"{len(steps):,} steps ({steps[0]:,} to {steps[-1]:,})" if len(steps) else "no step"


def sample_text(one: Mapping[str, Any]) -> str:
    examples = f"   {one['examples']} examples" if one["examples"] > 1 else ""
    source = f"   {one['source']}" if one["source"] else ""
    return (
        f"  {one['id']}   {Path(one['file']).name}:{one['line']}   {one['supervised']:,} of {one['tokens']:,} tokens "
        f"supervised{examples}   {one['hash']}{source}"
    )


def _reasons(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{reason} {count:,}' for reason, count in counts.items())})" if counts else ""


def _lost(counts: Mapping[str, int]) -> str:
    return f"; left out{_reasons(counts)}" if counts else ""


def _counts(roles: Mapping[str, int]) -> str:
    return ", ".join(f"{role} {count:,}" for role, count in roles.items())


def _listed(numbers: list[int]) -> str:
    more = f", ... {numbers[-1]:,}" if len(numbers) > LISTED else ""
    return ", ".join(f"{number:,}" for number in numbers[:LISTED]) + more
