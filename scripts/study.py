"""The quickstart's claims over several seeds, with harder controls and paired intervals.

    python scripts/study.py output_dir=runs/study seeds=1,2,3 [workers=2]

Every seed has its own weights, training problems and held-out problems; the settings were chosen on seed 0, which is
not among the default seeds.  A second stage is compared, seed by seed, with controls that start from the same
checkpoint: SFT continued, SFT continued with the sequence mean that IFT uses, SFT on the chosen answers of DPO's pairs,
and for CPO its first stage continued.  Prints Markdown: the values, and the mean paired difference with a 95 % interval
(Student's t over seeds).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quickstart import SECOND, STYLE, Job, jobs, results, settings, train_all

from alignlab import student

PROMPTS = 300
"""Held-out prompts that every model answers."""

COMPARED = (
    ("IFT - SFT continued", "ift", "sft-continued", "eval_correct"),
    ("IFT - SFT continued, sequence mean", "ift", "sft-sequence", "eval_correct"),
    ("DPO - SFT continued", "dpo", "sft-continued", "eval_correct"),
    ("DPO - SFT on the chosen answers", "dpo", "sft-chosen", "eval_correct"),
    ("CPSFT - SFT (control)", "cpsft", None, "eval_control/match"),
    ("CPO - CPSFT continued (control)", "cpo", "cpsft-continued", "eval_control/match"),
    ("CPO - CPSFT continued (answers right)", "cpo", "cpsft-continued", "eval_correct"),
)
"""(label, run, control run or None for the run's own start, metric)"""


def with_controls(seed: int) -> tuple[Job, ...]:
    """The quickstart's trainings and the controls, all of them as long as what they are compared with."""
    second = 2 * seed + 1
    chosen = settings("sft", SECOND, 1e-3, second)
    chosen["data.options"] = {**chosen["data.options"], "kind": "pairs"}
    made = (
        *jobs(seed),
        Job("sft-sequence", "sft", settings("sft", SECOND, 1e-3, second, **{"objective.unit": "sequence"})),
        Job("sft-chosen", "sft", chosen),
        Job("cpsft-continued", "cpsft", settings("cpsft", 120, 3e-4, second, **STYLE)),
    )
    return tuple(replace(job, settings={**job.settings, "eval.generate": PROMPTS}) for job in made)


def main(arguments: list[str]) -> int:
    given = dict(word.split("=", 1) for word in arguments)
    out, seeds = Path(given.get("output_dir", "runs/study")), [int(s) for s in given.get("seeds", "1,2,3").split(",")]
    found = []
    for seed in seeds:
        todo = with_controls(seed)
        train_all(todo, out / f"seed-{seed}", seed, int(given.get("workers", 2)))
        found.append(results(todo, out / f"seed-{seed}"))
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    print(f"\n| run | measure | {heads} |\n|---|---|{'---|' * len(seeds)}")
    for name in found[0]:
        for metric in ("eval_correct", "eval_control/match", "eval_accuracy"):
            if metric in found[0][name]["after"]:
                cells = " | ".join(
                    f"{100 * one[name]['before'][metric]:.1f} -> {100 * one[name]['after'][metric]:.1f}"
                    for one in found
                )
                print(f"| {name} | {metric.removeprefix('eval_')} | {cells} |")
    print("\n| difference, in points | mean | 95 % interval |\n|---|---|---|")
    for label, run, control, metric in COMPARED:
        differences = [
            100 * (one[run]["after"][metric] - (one[control]["after"] if control else one[run]["before"])[metric])
            for one in found
        ]
        found_in = student.of_mean(differences)
        print(f"| {label} | {found_in.mean:+.1f} | {found_in.low:+.1f} to {found_in.high:+.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
