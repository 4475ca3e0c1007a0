"""Draw the curves of runs, one panel a metric: python scripts/curves.py OUT.png RUN [RUN ...] [metric=NAME ...]."""

from __future__ import annotations

import sys
from pathlib import Path

from alignlab.measuring.report import read_series

DEFAULT_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")


def draw(runs: dict[str, Path], metrics: tuple[str, ...], out: Path) -> list[str]:
    """One panel for each metric that some run has, one line a run (label -> folder); the metrics drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {label: read_series(folder) for label, folder in runs.items()}
    drawn = [name for name in metrics if any(name in of_run for of_run in series.values())]
    if not drawn:
        raise SystemExit(f"none of {', '.join(metrics)} in {', '.join(str(folder) for folder in runs.values())}")
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 3.2), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], drawn, strict=True):
        for label, of_run in series.items():
            if name in of_run:
                axis.plot(*zip(*of_run[name], strict=True), label=label, linewidth=1)
        axis.set(title=name, xlabel="step")
        axis.legend(fontsize="small")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return drawn


def main(arguments: list[str]) -> None:
    metrics = tuple(a.removeprefix("metric=") for a in arguments if a.startswith("metric=")) or DEFAULT_METRICS
    places = [a for a in arguments if not a.startswith("metric=")]
    if len(places) < 2:
        raise SystemExit(__doc__)
    out, *folders = map(Path, places)
    print(f"{out}: {', '.join(draw({folder.name: folder for folder in folders}, metrics, out))}")


if __name__ == "__main__":
    main(sys.argv[1:])
