"""What the game measures: squared distances of transition matrices, and paired differences over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from lake import Lake

from alignlab import student

LEVEL = 0.99


def rows_of(lake: Lake) -> dict[str, np.ndarray]:
    """Name -> [cells]: over which rows of the matrix the error is averaged.

    ``reachable``: where the agent moves, the figure that is compared; ``all``: holes and the gift too; then those on
    the optimal trajectory, and those on the sub-optimal one alone.
    """
    best, other = (np.isin(np.arange(lake.cells), path) & lake.acting for path in lake.trajectories())
    every = np.ones(lake.cells, dtype=bool)
    return {"reachable": lake.acting, "all": every, "optimal": best, "sub-optimal": other & ~best}


def mse(found: np.ndarray, target: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[...]: mean squared difference of matrices [..., cells, cells], over all entries of the chosen rows."""
    return ((found - target)[..., rows, :] ** 2).mean((-2, -1))


def paired(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """``one - other`` over seeds [n]: mean, 99 % interval, two-sided p of Student's paired test, share below zero."""
    differences = (one - other).tolist()
    found = student.of_mean(differences, LEVEL)
    error = found.half / student.point((1 + LEVEL) / 2, len(differences) - 1)
    p = 1 - student.within(abs(found.mean) / error, len(differences) - 1) if error else float(found.mean == 0)
    return {
        "mean": found.mean, "low": found.low, "high": found.high, "p": p,
        "below": float(np.mean(one < other)),
    }  # fmt: skip


def summary(matrices: Mapping[str, np.ndarray], target: np.ndarray, lake: Lake) -> dict[str, Any]:
    """Each arm's errors from its matrices [seeds, times, cells, cells]: at the end, over training, and against others.

    ``<arm>.mse.<rows>``: mean over seeds at the end; ``<arm>.curve``: reachable cells, mean over seeds at each time;
    ``<arm>.best``: the curve's least value; ``<arm>-<other>``: paired difference on reachable cells at the end, and
    ``at best`` with each arm at the time of its curve's least value.
    """
    rows = rows_of(lake)
    errors = {arm: mse(found, target, rows["reachable"]) for arm, found in matrices.items()}
    best = {arm: found[:, found.mean(0).argmin()] for arm, found in errors.items()}
    made: dict[str, Any] = {}
    for arm, found in matrices.items():
        curve = errors[arm].mean(0)
        made[arm] = {
            "mse": {name: float(mse(found[:, -1], target, chosen).mean()) for name, chosen in rows.items()},
            "deviation": float(errors[arm][:, -1].std(ddof=1)),
            "curve": [float(value) for value in curve],
            "best": float(curve.min()),
        }
    for one, other in combinations(matrices, 2):
        made[f"{other}-{one}"] = paired(errors[other][:, -1], errors[one][:, -1])
        made[f"{other}-{one} at best"] = paired(best[other], best[one])
    return made
