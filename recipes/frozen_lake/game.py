"""The game: from the same random agent, SFT and IFT learn the optimal trajectory; DPO and ORPO get it as chosen and the
sub-optimal one as rejected; then every policy's transition matrix is compared with the optimal policy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lake import MAPS, Lake
from measure import mse, summary
from policy import FIT, Row, Training, matrix_of, new_policy, save, transitions

from alignlab.errors import ConfigError

COMMON: dict[str, Any] = {
    "train.max_steps": 60, "optim": "rmsprop", "optim.learning_rate": 3e-4, "optim.warmup_ratio": 0.1,
}  # fmt: skip
"""Of every arm: the paper's optimizer, schedule (cosine) and warm-up; steps and learning rate are ours."""
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft", "objective.unit": "sequence"},
    "ift": {"objective": "ift", "objective.max_lambda": 0.2, "objective.gamma": 0.95},
    "dpo": {"objective": "dpo", "objective.beta": 0.1},
    "orpo": {"objective": "dpo", "objective.loss_type": "orpo", "objective.beta": 0.25},
}
"""The paper's settings of each method, as keys of ``alignlab train``."""
ON_PAIRS = ("dpo", "orpo")
EVERY = 5
"""Steps between two looks at a policy."""


def rows_for(lake: Lake) -> dict[str, list[Row]]:
    """The two kinds of rows: ``demonstration`` (the optimal trajectory), ``pair`` (with the sub-optimal one)."""
    best, other = lake.trajectories()
    return {
        "demonstration": [{"input_ids": best, "prompt_length": 1}],
        "pair": [{"chosen_input_ids": best, "rejected_input_ids": other, "prompt_length": 1}],
    }


def play(
    folder: Path,
    models: dict[str, Path],
    seed: int,
    *,
    map: str,
    seeds: int = 20,
    ends: bool = False,
    common: dict[str, Any] | None = None,
    grid: dict[str, list[float]] | None = None,
    **changes: dict[str, Any],
) -> dict[str, Any]:
    """Play on ``map`` with ``seeds`` nets, numbers ``seed * seeds`` and up, each trained by every arm in this process.

    The start policies are fitted where the agent moves, with ``ends`` in the holes and at the gift too, where
    gymnasium's table stays.  ``common`` and ``changes`` (by arm) are keys on top of :data:`COMMON` and :data:`ARMS`.
    ``grid`` has values of ``max_lambda`` and ``gamma``: IFT is trained with each while the other keeps its value.

    Returns :func:`measure.summary` of the arms; ``grid``: the same of IFT's variants beside SFT; ``start``: the error
    of the start policies; ``fit``: errors of the two fitted policies; ``steps`` of the curves.  ``matrices.npz`` in
    the folder keeps the last matrices of each arm.
    """
    lake = Lake(MAPS[map])
    work = folder / "work"
    numbers = range(seed * seeds, (seed + 1) * seeds)
    nets = [save(new_policy(lake.cells, number), work / f"net-{number}") for number in numbers]
    if unknown := sorted(set(changes) - set(ARMS)):
        raise ConfigError(f"no such arm: {', '.join(unknown)} (known: {', '.join(ARMS)})")
    everywhere = np.ones(lake.cells, dtype=bool)
    begun = everywhere if ends else lake.acting
    starts, random_error = _fitted(work, "random", lake.random(), begun, nets, list(numbers))
    (best,), optimal_error = _fitted(work, "optimal", lake.optimal(), everywhere, nets[:1], [seed])
    target = best[1]

    rows = rows_for(lake)
    arms = {name: {**keys, **changes.get(name, {})} for name, keys in ARMS.items()}

    def trained(name: str, keys: dict[str, Any]) -> np.ndarray:
        kind = "pair" if name in ON_PAIRS else "demonstration"
        training = Training(work, kind, rows[kind], {**COMMON, **(common or {}), **keys}, nets[0])
        runs = [training.run(start, number, EVERY)[1] for (start, _), number in zip(starts, numbers, strict=True)]
        return np.stack(runs)

    matrices = {name: trained(name, keys) for name, keys in arms.items()}
    points = {
        name: trained(name, {**arms["ift"], "objective.max_lambda": strength, "objective.gamma": gamma})
        for name, strength, gamma in _points(grid or {})
    }
    kept = {name: found[:, -1] for name, found in matrices.items()}
    start = np.stack([matrix for _, matrix in starts])
    np.savez(folder / "matrices.npz", target=target, optimal=lake.optimal(), start=start, **kept)
    return {
        **summary(matrices, target, lake),
        "start": {"mse": float(mse(start, target, lake.acting).mean())},
        "fit": {"random": random_error, "optimal": optimal_error},
        "grid": summary({"sft": matrices["sft"], **points}, target, lake),
        "steps": [EVERY * (i + 1) for i in range(matrices["sft"].shape[1])],
    }


def _fitted(
    work: Path, name: str, wanted: np.ndarray, cells: np.ndarray, nets: list[Path], numbers: list[int]
) -> tuple[list[tuple[Path, np.ndarray]], float]:
    """Each net fitted to a matrix in ``cells``: ([(its folder, its matrix)], the largest error of any, there)."""
    training = Training(work, name, transitions(wanted, cells), FIT, nets[0])
    made = []
    for net, number in zip(nets, numbers, strict=True):
        model, _ = training.run(net, number)
        made.append((save(model, work / f"{name}-{number}"), matrix_of(model)))
    return made, max(float(mse(matrix, wanted, cells)) for _, matrix in made)


def _points(grid: dict[str, list[float]]) -> list[tuple[str, float, float]]:
    """(name, lambda, gamma) of every point."""
    own = ARMS["ift"]
    chosen = [(strength, own["objective.gamma"]) for strength in grid.get("max_lambda", [])]
    chosen += [(own["objective.max_lambda"], gamma) for gamma in grid.get("gamma", [])]
    return [(f"lambda={strength:g} gamma={gamma:g}", strength, gamma) for strength, gamma in chosen]
