"""The page of a run: its figures and curves, remarks on how to read them, and the pairs it makes suspect.

One HTML file without scripts and without anything to fetch; rows' text is escaped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from alignlab.measuring.forensics import Figures, Paths

Series = dict[str, list[tuple[int, float]]]

PANELS = (
    ("loss",), ("eval_loss",), ("grad_norm",), ("learning_rate",), ("rewards/accuracies", "eval_rewards/accuracies"),
    ("rewards/chosen", "rewards/rejected"), ("rewards/margins", "eval_rewards/margins"),
    ("logps/chosen", "logps/rejected"), ("accuracy", "eval_accuracy"), ("margin", "eval_margin"), ("lambda",),
)  # fmt: skip
"""What is drawn, where a run has it: one panel each."""

DISPLACED = 0.05
"""A fall of the chosen log-probability by more than this share of it is remarked on."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2rem } table { border-collapse: collapse }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top } svg { max-width: 100%; height: auto }
.pair { border-top: 1px solid #ccc; padding: .6rem 0 } .sides { display: flex; gap: 1rem }
.sides > div { flex: 1; min-width: 0 } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5;
padding: .5rem; margin: .2rem 0; max-height: 16rem; overflow: auto; font-size: 13px } .note { color: #555 }
"""


@dataclass(frozen=True)
class Suspect:
    """One pair for reading."""

    sample: str
    """the sample's id"""
    place: str
    """file and line"""
    prompt: str
    chosen: str
    rejected: str
    figures: Mapping[str, float]
    path: Sequence[tuple[int, float]]
    """(step, margin) of every visit"""


def read_series(run: Path) -> Series:
    """Metric -> [(step, value)] of a run folder; where a resumed attempt repeats a step, the later one counts."""
    points: dict[str, dict[int, float]] = {}
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            for name, value in record.items():
                if name not in ("step", "attempt") and isinstance(value, int | float):
                    points.setdefault(name, {})[record["step"]] = value
    return {name: sorted(by_step.items()) for name, by_step in points.items()}


def most_suspect(found: Paths, count: Figures, number: int) -> list[int]:
    """The ``number`` pairs with the highest suspicion, highest first; ties in the order of the data."""
    return np.argsort(-count.suspicion, kind="stable")[:number].tolist()


def remarks(series: Series) -> list[str]:
    """What a reader of these curves often asks."""
    found = []
    if (chosen := series.get("logps/chosen")) and len(chosen) > 1:
        first, last = chosen[0][1], chosen[-1][1]
        if first < 0 and last < first * (1 + DISPLACED):
            found.append(
                f"The log-probability of chosen answers fell from {first:.1f} to {last:.1f} (likelihood displacement). "
                "A pair loss fixes the margin between the sides and neither side alone, so both may fall. Where chosen "
                "answers shall stay likely: objective.loss_type=[sigmoid,sft], or a larger objective.beta."
            )
    if (accuracy := series.get("rewards/accuracies")) and accuracy[0][0] <= 1:
        found.append(
            "rewards/accuracies of the first step compares rounding errors: policy and reference are the same then. "
            "It counts pairs whose chosen side has gained more than the rejected one since the start, which is not how "
            "often the policy prefers it."
        )
    return found


def page(title: str, facts: Sequence[tuple[str, str]], series: Series, suspects: Sequence[Suspect], note: str) -> str:
    """The whole page.  ``facts`` are lines of a table; ``note`` stands above the suspects, or in their place."""
    table = "".join(f"<tr><th>{escape(head)}</th><td>{escape(text)}</td></tr>" for head, text in facts)
    reading = "".join(f"<li>{escape(text)}</li>" for text in remarks(series))
    parts = [
        f"<h1>{escape(title)}</h1><table>{table}</table>",
        f"<h2>Curves</h2>{curves_svg(series)}",
        f"<h2>Reading them</h2><ul>{reading}</ul>" if reading else "",
        f'<h2>Suspect pairs</h2><p class="note">{escape(note)}</p>',
        *(_pair(place, suspect) for place, suspect in enumerate(suspects, 1)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def curves_svg(series: Series, wanted: Sequence[Sequence[str]] = PANELS, over: str = "step") -> str:
    """The panels as one inline picture; a sentence where nothing is to be drawn."""
    panels = [[name for name in names if name in series] for names in wanted]
    panels = [names for names in panels if names]
    if not panels:
        return "<p>No metric has been logged yet.</p>"
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns, 2.6 * rows), layout="constrained")
    for axis, names in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        for name in names:
            axis.plot(*zip(*series[name], strict=True), label=name, linewidth=1.2, marker="." * (len(series[name]) < 9))
        axis.set_xlabel(over)
        axis.legend(fontsize="small")
    for axis in figure.axes[len(panels) :]:
        axis.set_axis_off()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _pair(place: int, suspect: Suspect) -> str:
    figures = "   ".join(f"{name} {value:.3g}" for name, value in suspect.figures.items())
    path = ", ".join(f"{step}: {margin:+.2f}" for step, margin in suspect.path)
    sides = "".join(
        f"<div><b>{name}</b><pre>{escape(text)}</pre></div>"
        for name, text in (("chosen", suspect.chosen), ("rejected", suspect.rejected))
    )
    return (
        f'<div class="pair"><b>{place}. {escape(suspect.sample)}</b> <span class="note">{escape(suspect.place)}</span>'
        f'<br><span class="note">{escape(figures)}<br>margin by step: {escape(path)}</span>'
        f'<pre>{escape(suspect.prompt)}</pre><div class="sides">{sides}</div></div>'
    )
