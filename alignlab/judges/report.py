"""A judgement's lines for people; the JSON has all figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignlab.judges.endpoint import Estimate


def estimate_lines(estimate: Estimate, concurrency: int) -> list[str]:
    """What asking will take, said before anything is asked."""
    lines = [
        f"calls    {estimate.asked + estimate.cached:,}: {estimate.cached:,} answered before (cache), "
        f"{estimate.asked:,} to ask, {concurrency} at a time"
    ]
    out = "no limit on tokens out" if estimate.most_out is None else f"at most {estimate.most_out:,} out"
    cost = "give judge.price_in= and judge.price_out= for a cost"
    if estimate.least is not None:
        most = "" if estimate.most is None else f" to {estimate.most:,.2f}"
        cost = f"cost {estimate.least:,.2f}{most}, in the currency of the prices"
    lines.append(f"tokens   about {estimate.tokens_in:,} in, {out}; {cost}")
    return lines


def lines(kind: str, result: Mapping[str, Any]) -> list[str]:
    """The table of a judgement."""
    made = {"pair": _pair, "score": _scores, "ranking": _rankings}[kind](result["figures"], result["sides"])
    asked = result["asked"]
    cost = "" if asked["cost"] is None else f", cost {asked['cost']:,.2f}"
    made.append(
        f"asked    {asked['calls']:,} calls; all replies, cached ones too: {asked['tokens_in']:,} tokens in, "
        f"{asked['tokens_out']:,} out by the endpoint's count{cost}"
    )
    return made


def _pair(found: Mapping[str, Any], sides: list[str]) -> list[str]:
    position, length = found["position"], found["length"]
    made = [
        f"win rate {_interval(found['win_rate'])} of {sides[0]} over {sides[1]}   {found['prompts']:,} prompts: "
        f"{found['wins']} won, {found['ties']} tied, {found['losses']} lost{_unread(found)}"
    ]
    if found["identical"]:
        made.append(
            f"same     {found['identical']:,} prompts have the same answer on both sides: ties, not asked about"
        )
    if position["changed"] is not None:
        first = position["shown_first_wins"]
        shown = (
            "" if first is None else f"; the answer shown first gets {first:.3f} of {position['verdicts']:,} verdicts"
        )
        made.append(
            f"position the verdict changes with the order in {_interval(position['changed'])} of prompts{shown}"
        )
    return [*made, *_length(length)]


def _length(length: Mapping[str, Any]) -> list[str]:
    if length["longer_wins"] is None:
        return []
    return [
        f"length   winners {length['winner']:.0f} characters, losers {length['loser']:.0f}; the longer answer wins in "
        f"{_interval(length['longer_wins'])} of decided prompts"
    ]


def _scores(found: Mapping[str, Any], sides: list[str]) -> list[str]:
    made = []
    for name, one in found["sides"].items():
        lost = f", {one['unparsable']} replies without a verdict" if one["unparsable"] else ""
        by_length = one["length_correlation"]
        grown = "" if by_length is None else f"   rank correlation with length {by_length:+.2f}"
        made.append(f"score    {_interval(one['mean'], 2)} {name}   {one['prompts']:,} prompts{lost}{grown}")
    for name, one in found["differences"].items():
        made.append(f"against  {_interval(one['difference'], 2)} {sides[0]} minus {name}, {one['prompts']:,} prompts")
    return made


def _rankings(found: Mapping[str, Any], sides: list[str]) -> list[str]:
    made = [
        f"side     {name}: score {_interval(one['score'], 2)}, rank {_interval(one['rank'], 2)}"
        for name, one in found["sides"].items()
    ]
    for name, won in found["win_rates"].items():
        made.append(f"win rate {_interval(won['win_rate'])} of {sides[0]} over {name}, by rank")
        made += _length(won["length"])
    changed = found["position"]["changed"]
    made.append(
        f"position the best answer changes with the order in {_interval(changed)} of {found['prompts']:,} "
        f"prompts{_unread(found)}; {found['contradictions']} rankings contradict their own scores"
    )
    return made


def _unread(found: Mapping[str, Any]) -> str:
    if not found["unparsable"]:
        return ""
    return f"; {found['unparsable']} replies without a verdict, {found['incomplete']} prompts left out for it"


def _interval(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    if interval is None:
        return "-"
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
