"""``alignlab probe``: the first optimizer step's loss, gradient norms and metrics, without an update.

What an outside check, or a colleague on another machine, compares first: it depends on the model, the rows and the
objective alone, not on ranks, packing or the engine.
"""

from __future__ import annotations

from typing import Any

from alignlab import dist, liveness
from alignlab.metrics import Meter, finish
from alignlab.request import Request, emit
from alignlab.runs.job import assemble, attach_reference, check_flags, prepare_data
from alignlab.train.loop import Progress, context_of
from alignlab.train.step import accumulate, with_statistics


def run(request: Request) -> int:
    """Print (or give as JSON) ``loss``, ``grad_norm`` before clipping, ``grad_norms`` by parameter, ``metrics``."""
    liveness.gate(request)
    config = request.config
    data = prepare_data(config)
    check_flags(data)
    dist.init(timeout=config.engine.timeout, group=config.engine.name.startswith("zero"))
    try:
        result = _first_step(config, data)
    finally:
        dist.shutdown()
    if dist.is_main():
        if request.json is not True:
            _print(result)
        emit(request, result)
    return 0


def _first_step(config: Any, data: Any) -> dict[str, Any]:
    job = assemble(config, data)
    attach_reference(job)
    engine = job.engine
    plan = job.plans.at(0)
    progress = Progress()
    context = context_of(job.plans, plan, 0, config.optim, config.seed, progress)
    context = with_statistics(engine, data.objective, job.loader, plan, context)
    meter = Meter()
    loss = accumulate(engine, data.objective, job.loader, plan, context, meter, backward=True)
    norms = {name.removeprefix("model."): value for name, value in engine.gradient_norms().items()}
    names = meter.names
    metrics = finish(names, engine.reduce(meter.stacked(names, engine.device)))
    total = engine.reduce(loss.reshape(1)).item()
    engine.zero()
    return {
        "objective": data.objective.name,
        "loss": total,
        "grad_norm": sum(value**2 for value in norms.values()) ** 0.5,
        "grad_norms": norms,
        "metrics": metrics,
        "totals": {unit.value: count for unit, count in plan.totals.items()},
        "examples": len(plan.examples),
        "layout": job.scorer.layout,
        "engine": engine.name,
        "dtype": str(job.loaded.dtype).removeprefix("torch."),
    }


def _print(result: dict[str, Any]) -> None:
    print(
        f"object   {result['objective']}   {result['examples']} examples   layout {result['layout']}   "
        f"{result['dtype']}"
    )
    print(f"loss     {result['loss']:.8g}")
    print(f"norm     {result['grad_norm']:.8g}   (before clipping)")
    for name, value in sorted(result["metrics"].items()):
        print(f"metric   {name} {value:.6g}")
    for name, value in result["grad_norms"].items():
        print(f"grad     {value:.6e}  {name}")
