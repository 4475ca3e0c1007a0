"""The figures of a reward model as lines to read; every line is made of the JSON's values alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDEST = 40
"""Characters of a category's name."""


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The table of one model."""
    several = result["categories"] if len(result["categories"]) > 1 else {}
    rows = {_cut(name): found for name, found in several.items()} | {"all": result}
    width = max(map(len, ["category", *rows]))
    titles = f"{'pairs':>6} {'prompts':>7}  {'accuracy':>8}  {'95 % interval':<14}  {'longer':>6}  margin"
    yield f"{'category':<{width}}  {titles}"
    for name, found in rows.items():
        yield (
            f"{name:<{width}}  {found['pairs']:>6} {found['prompts']:>7}  {found['accuracy']['value']:>8.3f}  "
            f"{_ends(found['accuracy'])}  {found['longer_is_better']['value']:>6.3f}  {found['margin']:+.3g}"
        )
    yield f"ties     {result['ties']} (half right)   interval: {_method(result)}"
    yield (
        f"longer   longer-is-better {_figure(result['longer_is_better'])}   "
        f"accuracy less that {_figure(result['over_longer'], '+.3f')}"
    )
    if result["benchmark"]:
        yield from _benchmark(result["benchmark"])
    if slope := result["length_slope"]:
        t = f", t {slope['t']:.2g}" if "t" in slope else ""
        yield f"length   {slope['slope']:+.3g} reward a token (standard error {slope['standard_error']:.2g}{t})"
    signs = result["signs"]
    yield (
        f"signs    chosen > 0 {signs['chosen_positive']['value']:.3f}, rejected < 0 "
        f"{signs['rejected_negative']['value']:.3f}, both {_figure(signs['both'])}   "
        f"mean chosen {signs['mean_chosen']:+.3g}, rejected {signs['mean_rejected']:+.3g}"
    )
    calibration = result["calibration"]
    yield f"calibr.  expected error {calibration['error']:.3f}   log loss {calibration['log_loss']:.4f}"
    if alone := result["batch_invariance"]:
        yield (
            f"batch    largest change of a reward alone against in its batch {alone['largest']:.2g} "
            f"({alone['relative']:.1g} standard deviations; {alone['sequences']} answers, at row {alone['row']})"
        )
    for found in result["best_of_n"]:
        share = "" if found["share"] is None else f"   {found['share']:.0%} of the way"
        yield (
            f"best of  {found['n']!s:>3}: {found['model']:.4g}   random {found['random']:.4g}, oracle "
            f"{found['oracle']:.4g}{share}   regret {_figure(found['regret'], '.3g')}   {found['pools']} pools"
        )


def comparison(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one model against another."""
    yield (
        f"against  {found['against_model']}   {found['accuracy']:.3f} - {found['against']:.3f} = "
        f"{found['difference']['value']:+.3f} {_ends(found['difference'])}   {found['pairs']} pairs"
        + (f", {found['left_out']} rows left out (lost by one of the two)" if found["left_out"] else "")
    )
    yield (
        f"McNemar  only the first right {found['only_first_right']}, only the second "
        f"{found['only_second_right']}   p {found['p']:.3g}"
    )


def _benchmark(found: Mapping[str, Any]) -> Iterator[str]:
    of = f" of {found['of_rows']:,}" if "of_rows" in found else ""
    yield f"{found['name']}   {found['rows']:,}{of} rows"
    shown = dict(found["sections"])
    shown |= {"Prior sets": found["prior_sets"]} if found.get("prior_sets") else {}
    shown |= {"overall": found["overall"]} if found["overall"] else {}
    shown |= {"with prior sets": found["overall_with_prior_sets"]} if found.get("overall_with_prior_sets") else {}
    for name, figure in shown.items():
        yield f"  {name:<16} {_figure(figure)}"
    if found.get("short_rows"):
        yield f"  {found['short_rows']} rows have fewer than three answers to beat (left out)"
    if found["missing"]:
        listed = ", ".join(found["missing"][:4]) + (" ..." if len(found["missing"]) > 4 else "")
        yield f"  missing          {len(found['missing'])} subsets: {listed}"


def _cut(name: str) -> str:
    return name if len(name) <= WIDEST else f"{name[: WIDEST - 3]}..."


def _figure(interval: Mapping[str, Any], form: str = ".3f") -> str:
    return f"{interval['value']:{form}} {_ends(interval, form)}".rstrip()


def _ends(interval: Mapping[str, Any], form: str = ".3f") -> str:
    return "" if interval["low"] is None else f"[{interval['low']:{form}}, {interval['high']:{form}}]"


def _method(result: Mapping[str, Any]) -> str:
    if result["accuracy"]["method"] == "wilson":
        return "Wilson"
    return f"bootstrap over prompts ({result['resamples']:,} draws, seed {result['seed']})"
