"""A lint's report, for people and for programs."""

from __future__ import annotations

from typing import Any

from alignlab.lint.check import Report
from alignlab.lint.findings import KINDS


def lines(report: Report) -> list[str]:
    """The table: errors first, each kind with its rows and the first of them."""
    held = ", ".join(f"{count:,} of {path}" for path, count in report.held_out.items())
    made = [f"rows     {report.rows:,} read, {report.examples:,} examples{'; held out: ' + held if held else ''}"]
    counts = report.findings.counts
    for kind in sorted(counts, key=lambda kind: not KINDS[kind].error):
        entry, share = report.findings.first(kind), 100 * counts[kind] / max(1, report.rows)
        amount = f"{counts[kind]:>7,} {share:5.1f}%" if "file" in entry else f"{'':>14}"
        made.append(f"{_class(kind):<8} {kind:<22} {amount}  {KINDS[kind].about}{_where(entry)}")
    length = report.length
    if length.accuracy is not None:
        low, high = length.interval
        made.append(
            f"length   the longer answer is preferred in {length.accuracy:.3f} of {length.rows:,} rows "
            f"(95%: {low:.3f} to {high:.3f}); {length.equal:,} pairs of equal length left out"
        )
    letters = report.letters.total()
    shares = ", ".join(
        f"{name} {100 * count / letters:.1f}% ({report.main_script[name]:,} rows)"
        for name, count in report.letters.most_common(8)
        if count / letters >= 0.0005 or report.main_script[name]
    )
    made.append(f"scripts  {shares or 'no letters'}")
    if report.languages:
        rows = report.languages.total()
        named = [
            f"{code} {100 * count / rows:.1f}% ({count:,} rows)" for code, count in report.languages.most_common(8)
        ]
        others = len(report.languages) - len(named)
        made.append(f"language {', '.join(named)}{f' and {others} more' if others else ''}")
    if report.benchmark_questions:
        made.append(
            f"bench    {report.benchmark_questions:,} questions looked for, {report.benchmark_short:,} too short for it"
        )
    made += [f"skipped  {what}" for what in report.not_checked]
    return made


def as_json(report: Report) -> dict[str, Any]:
    """Everything, findings with file and line."""
    counts = report.findings.counts
    length = report.length
    return {
        "rows": report.rows,
        "examples": report.examples,
        "held_out": dict(report.held_out),
        "findings": {kind: {"class": _class(kind), "count": count} for kind, count in counts.items()},
        "length": {
            "accuracy": length.accuracy,
            "interval": list(length.interval),
            "rows": length.rows,
            "pairs": length.pairs,
            "equal": length.equal,
        },
        "scripts": {"letters": dict(report.letters), "rows": dict(report.main_script)},
        "languages": dict(report.languages),
        "benchmark": {"questions": report.benchmark_questions, "too_short": report.benchmark_short},
        "not_checked": report.not_checked,
        "entries": report.findings.entries,
    }


def _class(kind: str) -> str:
    return "error" if KINDS[kind].error else "warning"


def _where(entry: dict[str, Any]) -> str:
    if "file" not in entry:
        return f" ({entry['detail']})"
    name = entry["file"].rpartition("/")[2]
    also = f" and {entry['other']['file'].rpartition('/')[2]}:{entry['other']['line']}" if "other" in entry else ""
    detail = f", {entry['detail'][:60]}" if "detail" in entry else ""
    return f": {name}:{entry['line']}{also}{detail}"
