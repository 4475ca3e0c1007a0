"""What a benchmark's runs say: rates, ratios pair by pair, whether both sides computed the same, and the table."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of a step's losses: sums in another order; in bf16 the sides also round elsewhere."""
CLOCKS = ("whole", "train")
PACKAGES = ("alignlab", "torch", "transformers", "trl", "accelerate", "datasets", "deepspeed", "liger-kernel")

Run = dict[str, Any]


def report(
    settings: dict[str, Any], names: tuple[str, str], runs: dict[str, list[Run]], *, rates: list[float], gpu: bool,
    search: list[dict[str, Any]], second_settings: dict[str, Any], machine: dict[str, Any], command: str,
) -> dict[str, Any]:  # fmt: skip
    """The result of one bench as one JSON object; ``rates`` are the matrix product rates measured beside the pairs."""
    first, second = (runs[name] for name in names)
    unit = "wall" if gpu else "cpu"
    examples = settings["batch"] * settings["steps"]
    rate = statistics.median(rates)
    return {
        "settings": settings,
        "sides": list(names),
        "second_settings": second_settings,
        "search": search,
        "machine": machine,
        "command": command,
        "void": why_void(first, second, settings),
        "unit": unit,
        "summary": {name: summary(runs[name], examples, rate) for name in names},
        "ratios": {
            **{clock: ratios(first, second, lambda run, c=clock: run[c][unit]) for clock in CLOCKS},
            "peak": ratios(second, first, lambda run: run["peak_mib"]),
        },
        "matmul_flops_per_second": {"median": rate, "all": rates},
        "runs": runs,
    }


def summary(runs: list[Run], examples: int, rate: float) -> dict[str, Any]:
    """Medians over the runs of one side.  MFU: the model's own work in the steps over what the machine could do then.

    ``mfu_cpu`` takes processor seconds a thread for the time, which other programs on the machine do not stretch.
    """

    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(map(of, runs))

    found = {
        "samples_per_second": median(lambda run: examples / run["whole"]["wall"]),
        "supervised_tokens_per_second": median(lambda run: run["supervised_tokens"] / run["whole"]["wall"]),
        "cpu_seconds_per_sample": median(lambda run: run["whole"]["cpu"] / examples),
        "train_wall_seconds": median(lambda run: run["train"]["wall"]),
        "whole_wall_seconds": median(lambda run: run["whole"]["wall"]),
        "peak_mib": median(lambda run: run["peak_mib"]),
        "mfu": median(lambda run: run["flops"] / run["train"]["wall"] / rate),
        "mfu_cpu": median(lambda run: run["flops"] * run["threads"] / run["train"]["cpu"] / rate),
        "losses": runs[0]["losses"],
    }
    if "reference_seconds" in runs[0]:
        found["reference_seconds"] = median(lambda run: run["reference_seconds"])
    return found


def ratios(below: list[Run], above: list[Run], of: Callable[[Run], float]) -> dict[str, Any]:
    """``above / below`` pair by pair."""
    pairs = [of(b) / of(a) for a, b in zip(below, above, strict=True)]
    return {"min": min(pairs), "median": statistics.median(pairs), "max": max(pairs), "pairs": pairs}


def why_void(first: list[Run], second: list[Run], settings: dict[str, Any]) -> str | None:
    """Why the runs cannot be compared; None where they can."""
    runs = [*first, *second]
    if settings["trl"] == "packed" and settings["against"] == "trl":  # other rows in a step, all of them in the end
        return (
            None if len({run["all"] for run in runs}) == 1 else "the sides do not hold the same token ids and targets"
        )
    if any(run["steps"] != runs[0]["steps"] for run in runs):
        return "the sides' steps do not hold the same token ids and targets"
    if settings["objective"] == "ift":  # another loss by design; each side has to repeat itself
        return next((why for side in (first, second) for run in side if (why := apart(side[0], run, settings))), None)
    return next((why for run in runs[1:] if (why := apart(runs[0], run, settings))), None)


def apart(one: Run, other: Run, settings: dict[str, Any]) -> str | None:
    """Why two runs are not of the same training, by their losses."""
    a, b = one["losses"], other["losses"]
    if len(a) != len(b) or len(a) != settings["steps"]:
        return f"{len(a)} and {len(b)} steps were taken in place of {settings['steps']}"
    gaps = [abs(x - y) / max(abs(x), abs(y), 1e-12) for x, y in zip(a, b, strict=True)]
    gap = max(gaps, key=lambda value: (value != value, value))  # a NaN is the largest of all
    limit = TOLERANCE[settings["dtype"]]
    return f"losses differ by {gap:.1e} relative (limit {limit:.0e})" if not gap <= limit else None


def machine(threads: int) -> dict[str, Any]:
    """Where and with what: processor or GPU, threads, versions, date."""
    import torch

    from alignlab.verbs.env import installed

    gpu = torch.cuda.is_available()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return {
        "device": torch.cuda.get_device_name() if gpu else name, "cores": os.cpu_count(), "gpu": gpu,
        "threads": threads, "versions": installed(PACKAGES),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------

HEAD = (
    "case", "times less, whole (min, max)", "steps only", "seconds a sample", "supervised tokens/s", "peak MiB (share)",
    "MFU", "losses",
)  # fmt: skip


def table(reports: list[dict[str, Any]]) -> str:
    """All results as one Markdown table, with the machines, searches and commands below it."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row(one)) + " |" for one in reports]
    notes = [f"- {case(one)}: {one['command']}{searched(one)}" for one in reports]
    machines = sorted({where(one["machine"]) for one in reports})
    return "\n".join([*lines, "", *machines, "", *notes])


def row(one: dict[str, Any]) -> list[str]:
    """The cells of one result; both sides as ``first / second``."""
    whole, train, peak = (one["ratios"][name] for name in ("whole", "train", "peak"))
    sides = [one["summary"][name] for name in one["sides"]]
    unit = one["unit"]

    def both(key: str, form: str) -> str:
        return " / ".join(format(side[key], form) for side in sides)

    if unit == "cpu":
        cost = f"{both('cpu_seconds_per_sample', '.3g')} cpu"
    else:
        cost = " / ".join(f"{1 / side['samples_per_second']:.3g}" for side in sides) + " wall"
    share = f"{both('peak_mib', ',.0f')} ({peak['median']:.2f})"
    losses = f"void: {one['void']}" if one["void"] else "equal"
    if not one["void"] and one["settings"]["objective"] == "ift":
        losses = "other by design"
    if not one["void"] and one["settings"]["trl"] == "packed":
        losses = "other rows in a step"
    spread = f"**{whole['median']:.2f}** ({whole['min']:.2f}, {whole['max']:.2f})"
    scored = sides[0]["supervised_tokens_per_second"] > 0
    speed = both("supervised_tokens_per_second", ",.0f") if scored else "none is"
    return [case(one), spread, f"{train['median']:.2f}", cost, speed, share, both("mfu", ".2f"), losses]


def case(one: dict[str, Any]) -> str:
    """``dpo, hh.jsonl.gz, smollm2 6 layers, against trl best``, with what else tells it from others."""
    given = one["settings"]
    depth = f"{given['layers']} layers" if given["layers"] else "whole"
    against = f"{given['against']} {given['trl']}" if given["against"] == "trl" else given["against"]
    more = f", second job ({given['cached']})" if given["cached"] != "none" else ""
    more += f", micro-batch {given['micro_batch']}" if given["micro_batch"] else ""
    device = "GPU" if one["machine"]["gpu"] else "CPU"
    return (
        f"{given['objective']}, {given['data']}, {given['model']} {depth} {given['dtype']}, {device}, {against}{more}"
    )


def where(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['device']}, {machine['cores']} cores, {threads}; {versions}; {machine['date']}"


def searched(one: dict[str, Any]) -> str:
    """The search's outcome in words."""
    if not one["search"]:
        return ""
    cost = [
        f"{entry['micro_batch']}{' ' + str(entry['settings']) if one['machine']['gpu'] else ''}: "
        + (entry["failed"] if "failed" in entry else f"{entry['seconds']:.3g} s")
        for entry in one["search"]
    ]
    return f"; search by micro-batch {', '.join(cost)}"
