"""A picture of the learnt policies: for each map and arm, the moves as arrows whose strength is their probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lake import MAPS, Lake

COLOURS = {"S": "#cfe8ff", "F": "#f4f9ff", "H": "#39424e", "G": "#ffe08a"}
SHOWN = 0.02
"""Moves of a smaller probability are left out."""
PANELS = ("optimal", "start", "sft", "ift", "dpo", "orpo")


def draw(folder: Path, models: dict[str, Path], seed: int) -> dict[str, Any]:
    """``policies.png`` in ``folder``: a row for each stage of the game in ``models``, named as its map."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * len(PANELS), 2.35 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(PANELS), squeeze=False)
    for line, (name, stage) in zip(axes, models.items(), strict=True):
        lake = Lake(MAPS[name])
        with np.load(stage / "matrices.npz") as stored:
            for axis, panel in zip(line, PANELS, strict=True):
                matrices = stored[panel].reshape(-1, lake.cells, lake.cells)
                error = ((matrices - stored["target"])[:, lake.acting] ** 2).mean()
                _panel(axis, lake, matrices.mean(0))
                axis.set_title(panel if panel == "optimal" else f"{panel}   MSE {error:.4f}", fontsize=9)
        line[0].set_ylabel(name)
    path = folder / "policies.png"
    figure.savefig(path, dpi=80)
    return {"picture": str(path), "bytes": path.stat().st_size}


def _panel(axis: Any, lake: Lake, matrix: np.ndarray) -> None:
    """One policy on its map: arrows to other cells, a dot where it stays."""
    width = len(lake.rows[0])
    for cell, letter in enumerate(lake.letters):
        y, x = divmod(cell, width)
        axis.add_patch(_square(x, y, COLOURS[letter]))
        if letter in "SG":
            axis.text(x - 0.42, y - 0.2, letter, fontsize=7, color="0.45")
        if not lake.acting[cell]:
            continue
        for other, probability in enumerate(matrix[cell]):
            if probability < SHOWN:
                continue
            there, across = divmod(other, width)
            strength = float(min(1.0, probability))
            if other == cell:
                axis.plot([x], [y], "o", color="#b03a2e", alpha=strength, markersize=3 + 3 * strength)
            else:
                step = {"head_width": 0.08 + 0.14 * strength, "length_includes_head": True, "linewidth": 0}
                axis.arrow(x, y, 0.62 * (across - x), 0.62 * (there - y), color="#b03a2e", alpha=strength,
                           width=0.015 + 0.05 * strength, **step)  # fmt: skip
    axis.set(xlim=(-0.5, width - 0.5), ylim=(len(lake.rows) - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])


def _square(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="#9aa7b5", linewidth=0.6)
