"""What each rank holds after a step, by part; called through ``spawn``, the tests judge it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from toy import Toy, accumulate, train_step

from alignlab import dist
from alignlab.config import EngineConfig, OptimConfig
from alignlab.engine import deepspeed
from alignlab.engine.base import make_engine
from alignlab.measuring.memory import model_states
from alignlab.models.load import DTYPES


def everything(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    dist.init(timeout=60)
    return {key: compared(**cell) for key, cell in cells.items()} | {"estimates": estimates()}


def compared(
    name: str, dtype: str = "fp32", adapter: bool = False, offload: bool = False, weight_decay: float = 0.1
) -> dict[str, Any]:
    """(predicted, real) bytes by part, when a step was done and the micro-batches of another one, but for its update.

    Every parameter has a gradient; some are larger than what ZeRO-3 keeps whole, some smaller.
    """
    deepspeed.PERSISTENCE = 100
    module = Toy(adapter=adapter)
    module.unused = nn.Identity()  # type: ignore[assignment]
    optim = OptimConfig(weight_decay=weight_decay)
    expected = model_states(module, {}, name, dist.world_size(), DTYPES[dtype], optim, offload)
    engine: Any = make_engine(name, module, optim, EngineConfig(name, offload, timeout=60), DTYPES[dtype])
    train_step(engine, 0)
    accumulate(engine, 1)
    found = _parts(engine)
    engine.step(1e-3)
    engine.close()
    together = {part: size + expected.host.get(part, 0) for part, size in expected.device.items()}
    return {"predicted": {**expected.host, **together}, "real": found}


def _parts(engine: Any) -> dict[str, int]:
    """On a CPU what is offloaded lies where everything else lies."""
    zero, parameters = engine._zero, list(engine.module.parameters())
    state = [v for of_one in engine._state().values() for v in of_one.values() if isinstance(v, Tensor)]
    weights = [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    masters = [] if engine.stage == 0 else engine._partitions()
    gradients = [p.grad for p in parameters] + [m.grad for m in masters]
    gradients += [getattr(p, "grad_accum", None) for p in parameters]
    gradients += [*_list(zero, "fp32_groups_gradients_flat"), getattr(zero, "grad_partitions_flat_buffer", None)]
    gradients += _list(zero, "accumulated_grads_in_cpu")
    for group in (*_list(zero, "averaged_gradients"), *_list(zero, "all_grad_tensors")):
        gradients += group or []
    buffers = [buffer for bucket in _list(zero, "ipg_buckets") for buffer in _of(bucket.buffer)]
    buffers += _list(zero, "param_buffer_of_bit16_for_cpu_offload_groups")
    buffers += [getattr(zero, f"temp_grad_buffer_for_{place}_offload", None) for place in ("cpu", "gpu")]
    return {
        "parameters": held(weights),
        "master weights": held(masters),
        "gradients": held(gradients),
        "optimizer": held(state),
        "buffers": held(buffers),
    }


def _list(owner: Any, name: str) -> list[Any]:
    found = getattr(owner, name, None) or []
    return list(found.values()) if isinstance(found, dict) else list(found)


def _of(buffer: Any) -> list[Tensor]:
    return [] if buffer is None else [buffer] if isinstance(buffer, Tensor) else list(buffer)


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def estimates() -> dict[str, list[int]]:
    """Bytes on a GPU by DeepSpeed's estimators and by ours (without buffers), of 10,000 parameters in bf16."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    deepspeed.PERSISTENCE = 100
    module = nn.Linear(100, 100, bias=False)
    theirs = {
        "zero2": estimate_zero2_model_states_mem_needs(10_000, 4, 1, False, 1.0)[1],
        "zero3": estimate_zero3_model_states_mem_needs(10_000, 0, 4, 1, False, False, False, 1.0)[1],
    }
    found = {}
    for name, size in theirs.items():
        ours = model_states(module, {}, name, 4, torch.bfloat16, OptimConfig()).device
        found[name] = [size, sum(ours.values()) - ours["buffers"]]
    return found
