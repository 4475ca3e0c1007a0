"""200 random SIGKILLs: 40 runs, each killed five times, each ending bit-identical to a run nobody touched.

A case is a run; its facts hold the kills.  Engines, precisions, LoRA and targets rotate; in half of the runs saves are
slowed, so that kills fall into them.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from harness import Harness
from moments import logged, somewhere, until_all_run, until_gone
from run import Case
from straight import straight

KILLS, STEPS, EVERY = 5, 42, 3
TARGETS = ("launcher", "agent", "0", "1", "all")
NAP = "forward:sleep_0.05@rank*:step*"
"""The model is so small that a run would be over before it can be hurt."""
SLOW_POINTS = ("mid_shard", "after_shard", "mid_manifest", "before_rename")
SLOW = ";".join([NAP, *(f"{point}:slow@rank*:step*" for point in SLOW_POINTS)])
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("zero2", ("model.dtype=fp32",)),
    ("zero3", ("model.dtype=bf16",)),
    ("local", ("model.dtype=fp32",)),
    ("zero1", ("model.dtype=bf16",)),
    ("zero0", ("model.dtype=fp32",)),
    ("zero3", ("model.dtype=fp32", "peft=lora")),
    ("zero2", ("model.dtype=bf16", "peft=lora")),
    ("local", ("model.dtype=bf16", "peft=lora")),
)
CASES, REAL = 40, (0, 1, 3, 12)
"""``REAL``: numbers of the cases that go through torchrun itself."""


def killed(number: int, harness: Harness, *, kills: int = KILLS, steps: int = STEPS) -> dict[str, Any]:
    """One case."""
    draw = random.Random(number)
    engine, more = KINDS[number % len(KINDS)]
    real, ranks = number in REAL, 1 if engine == "local" else 2
    options: dict[str, Any] = {"ranks": ranks, "steps": steps, "save_steps": EVERY}
    expected = straight(harness, engine, *more, **options)
    run = harness.run(engine, *more, **options, real=real)
    facts: list[dict[str, Any]] = []
    while len(facts) < kills:
        started = run.start(fault=SLOW if number % 2 else NAP)
        if engine != "local":
            until_all_run(started)
        moment = somewhere(run, started, draw, within=steps // (kills + 1))
        pids = started.pids()
        target = draw.choice(TARGETS) if engine != "local" else "launcher"
        assert started.poll() is None, f"the run ended before kill {len(facts) + 1}: {started.tail()}"
        for role in pids if target == "all" else [target]:
            started.kill(role)
        code = started.wait()
        until_gone(pids, 5.0)
        # A launcher whose ranks or agent were killed says so; one that was killed itself cannot.
        assert code in ((-9,) if target in ("launcher", "all") else (5,)), f"{target}: {code}: {started.tail()}"
        done, kept = logged(run), max(run.checkpoints(), default=0)
        assert done - kept <= EVERY, f"step {done} was logged and {kept} is the newest checkpoint"
        facts.append({"target": target, "moment": moment, "in a save": bool(run.leftovers()), "step": done})
    outcome = run.finish()
    assert outcome == expected, f"{outcome}\nand, straight, {expected}"
    assert run.leftovers() == [], run.leftovers()
    return {"kills": len(facts), "real": real, "engine": engine, "kind": " ".join(more), "each": facts}


def cases() -> list[Case]:
    """40, of five kills each."""
    names = ["-".join((e, *(word.partition("=")[2] for word in m))) for e, m in KINDS]
    return [
        Case(f"{n:02d}-{names[n % len(KINDS)]}{'-torchrun' if n in REAL else ''}", partial(killed, n))
        for n in range(CASES)
    ]
