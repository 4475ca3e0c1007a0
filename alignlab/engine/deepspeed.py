"""DeepSpeed's ZeRO, stages 0 to 3.  The only file that imports deepspeed, and only when an engine is made.

What is done here and not left to DeepSpeed, each for a reason met in practice: the optimizer is torch's (bit-exact
resume); gradient accumulation has no fixed length (the plan's micro-batch count differs from step to step); state
goes to disk as fragments (``shards``), not as DeepSpeed's pickles, which tie a checkpoint to a number of ranks and run
code when loaded; the norm and clipping of stage 0 are ours.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignlab import dist
from alignlab.config import EngineConfig, OptimConfig
from alignlab.engine import shards
from alignlab.engine.base import Collectives, check_state, frozen_hash, trainable
from alignlab.engine.local import load_whole, step_counter, whole_fragments
from alignlab.engine.optim import clip_, logged_norm, make_optimizer, parameter_groups, set_learning_rate, usable
from alignlab.errors import ConfigError
from alignlab.types import Ask, PackedBatch, Scores, StepInfo

PERSISTENCE = 100_000
"""ZeRO-3 keeps parameters of fewer elements whole on every rank; tests set it to 0 to shard the smallest."""


def prebuild(log: Callable[[str], None]) -> None:
    """What has to be compiled before the first run: nothing, and ``log`` is told so (see :func:`_import`)."""
    _import()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    log(f"deepspeed {version('deepspeed')}: no C++ op to build ({backend}, torch's optimizers)")


def _import() -> Any:
    """Import deepspeed, quiet and with plain collectives.

    On a CPU DeepSpeed would compile a shared-memory all-reduce at the first start (a minute and a C++ compiler; killed
    half-way it leaves a lock on which every later start waits for ever).  Only its inference uses that op.  We mark it
    as incompatible in DeepSpeed's own table, as it is on other platforms than Linux, and gloo serves instead: nothing
    is ever built.  Its logger loses the console and reaches the root logger's handlers (the run's log file).
    """
    logger = logging.getLogger("DeepSpeed")
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Else ZeRO-3 starts ``numactl`` at every micro-batch to learn how many ranks this machine has.
        os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("engine=zero0 .. zero3 needs the package deepspeed; engine=local does not") from None
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # its use of torch, once a call
    logger.handlers[:] = [logging.NullHandler()]
    logger.propagate = True
    if on_cpu:
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if not hasattr(deepspeed.DeepSpeedEngine, "managed_gradient_accumulation"):
        # Older ones ignore the key and would update after every micro-batch.
        raise ConfigError(f"deepspeed {version('deepspeed')} is too old for this engine: pip install -U deepspeed")
    return deepspeed


def deepspeed_config(
    stage: int, dtype: torch.dtype, optim: OptimConfig, offload_optimizer: bool, ranks: int, parameters: int
) -> dict[str, Any]:
    """The configuration DeepSpeed gets; ``parameters`` bounds its buckets, which are allocated at full size."""
    bucket = max(1024, min(500_000_000, parameters))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if stage == 3:
        zero.update(stage3_param_persistence_threshold=PERSISTENCE, stage3_prefetch_bucket_size=min(bucket, 50_000_000))
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if stage == 0 else optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


class DeepSpeedEngine(Collectives):
    """One data-parallel rank of ZeRO."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        config: EngineConfig,
        *,
        stage: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        deepspeed = _import()
        self.name = f"zero{stage}"
        self.stage = stage
        self.module = module
        self.device = device
        self.dp = dist.world_size()
        self.rank = dist.rank()
        self.updates = 0
        self._optim = optim
        self._shapes = {name: list(p.shape) for name, p in trainable(module)}
        self._dtype = str(dtype)
        self._frozen = dist.broadcast_object(frozen_hash(module) if self.rank == 0 else None)
        self._norm = 0.0
        self._pending = False
        self._captured: dict[str, float] | None = None
        optimizer = make_optimizer(parameter_groups(module, optim.weight_decay), optim)
        deepspeed.init_distributed(verbose=False)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(
                stage,
                dtype,
                optim,
                config.offload_optimizer,
                self.dp,
                sum(p.numel() for p in module.parameters()),
            ),
            dist_init_required=False,
        )
        dist.limit_groups()
        self._parameters = dict(trainable(module))
        optimizer.register_step_pre_hook(self._before_update)

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Torch's optimizer is about to run, on gradients that are reduced and, but for stage 0, clipped.

        Without gradients it does nothing, not even to its state: that is how an update is left out.
        """
        tensors = [t for group in optimizer.param_groups for t in group["params"] if t.grad is not None]
        skip = self._captured is not None
        if self.stage == 0:
            self._norm = clip_([t.grad for t in tensors], self._optim.max_grad_norm)
        else:  # its own check is for low precision only, and of the elements rather than of their squares
            self._norm = float(self._zero._global_grad_norm)
        skip = skip or not usable(self._norm)
        if self._captured is not None:
            for name, gradient in self._gradients(tensors):
                square = gradient.double().square().sum().item()
                self._captured[name] = self._captured.get(name, 0.0) + square
        if skip:
            for tensor in tensors:
                tensor.grad = None

    def _gradients(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of the gradients that hang on ``tensors``, by parameter."""
        ids = {id(t) for t in tensors}
        if self.stage == 0:  # every rank has all of them
            names = list(self._parameters)[self.rank :: self.dp]
            yield from ((n, self._parameters[n].grad) for n in names if id(self._parameters[n]) in ids)  # type: ignore[misc]
            return
        for name, _, flat, offset, length in self._flat():
            if id(flat) in ids:
                assert flat.grad is not None
                yield name, flat.grad[offset : offset + length]

    def score(self, batch: PackedBatch, ask: Ask) -> Scores:
        return self._engine(batch, ask)

    def backward(self, loss: Tensor, last: bool = False) -> None:
        self._pending = True
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> StepInfo:
        self._pending = False
        set_learning_rate(self._zero, lr)
        self._engine.step()
        if self.stage:
            self._norm = float(self._engine.get_global_grad_norm())
        updated = usable(self._norm) and bool(self._engine.was_step_applied())
        self.updates += updated
        return StepInfo(grad_norm=logged_norm(self._norm), updated=updated)

    def zero(self) -> None:
        """Throw gradients away.  Collective: stages 2 and 3 have theirs spread over the ranks, in the open step."""
        if self._pending:
            self.gradient_norms()

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def gradient_norms(self) -> dict[str, float]:
        updates, self._captured = self.updates, {}
        info = self.step(0.0)
        squares, self._captured = self._captured, None
        self.updates = updates
        if not math.isfinite(info.grad_norm):
            return dict.fromkeys(self._parameters, info.grad_norm)
        limit = self._optim.max_grad_norm
        clipped = min(1.0, limit / (info.grad_norm + 1e-6)) if limit > 0 else 1.0
        mine = torch.tensor([squares.get(name, 0.0) for name in self._parameters], dtype=torch.float64)
        norms = self.reduce(mine).sqrt() / clipped
        return dict(zip(self._parameters, norms.tolist(), strict=True))

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        from deepspeed.runtime.zero import GatheredParameters

        whole: dict[int, Tensor] = {}
        for p in self.module.parameters():
            with GatheredParameters([p], enabled=self.stage == 3):
                if self.rank == 0:
                    whole[id(p)] = p.detach().cpu().clone()
        if self.rank:
            return {}
        # keep_vars: the very parameter objects, so that tied names find their common tensor
        state = self.module.state_dict(keep_vars=True)
        return {name: whole[id(v)] if id(v) in whole else v.detach().cpu().clone() for name, v in state.items()}

    def _flat(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """Name, first element, this rank's flat partition and the run in it, of every trained parameter owned here."""
        for name, p in self._parameters.items():
            if self.stage == 3:
                group, offset, length = self._zero.grad_position[self._zero.get_param_id(p)]
                start = length * self.rank
                length = max(0, min(length, math.prod(self._shapes[name]) - start))  # the last rank's is padded
                if length:
                    yield name, start, self._zero.fp32_partitioned_groups_flat[group], offset, length
            else:
                mapping = p._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield name, there.start, self._partitions()[mapping.param_group_index], here.start, here.numel

    def _partitions(self) -> list[Tensor]:
        """This rank's flat float32 partition of each parameter group."""
        if self.stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        partitions = getattr(self._zero, "single_partition_of_fp32_groups", None)
        # stage 1 with float32 accumulation for bfloat16 is DeepSpeed's BF16_Optimizer, which has its own name for it
        return partitions if partitions is not None else self._zero.fp32_groups_flat_partition

    def _state(self) -> dict[Tensor, dict[str, Any]]:
        return self._zero.state if self.stage == 0 else self._zero.optimizer.state

    def _fragments(self) -> list[shards.Fragment]:
        if self.stage == 0:
            return whole_fragments(self._parameters, {}, self._zero, self.rank, self.dp)
        fragments = []
        for name, start, flat, offset, length in self._flat():
            kinds = {
                kind: value
                for kind, value in self._state().get(flat, {}).items()
                if isinstance(value, Tensor) and value.shape == flat.shape
            }
            values = {kind: value.detach()[offset : offset + length] for kind, value in kinds.items()}
            values[shards.PARAMETER] = flat.detach()[offset : offset + length]
            fragments.append(shards.Fragment(name, start, values))
        return fragments

    def _describe(self) -> dict[str, Any]:
        return {"dtype": self._dtype, "optimizer": self._optim.name, "frozen": self._frozen, "shapes": self._shapes}

    def state_bytes(self) -> int:
        return shards.byte_count(self._fragments())

    def save(self, folder: Path) -> None:
        shards.write_shard(folder, self.rank, self._fragments())
        if self.rank == 0:
            numbers = {"engine": self.name, "ranks": self.dp, "updates": self.updates}
            shards.write_state(folder, {**self._describe(), **numbers})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = shards.read_state(folder)
        check_state(state, self._describe(), folder)
        self.updates = state["updates"]
        if self.stage == 0:
            load_whole(folder, self._parameters, {}, self._zero, self._optim.name, self.updates)
            return
        optimizer = self._zero.optimizer
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()
        with shards.ShardReader(folder) as reader:
            # Flat partitions hold many parameters, so all have the same kinds: those of the last are anybody's.
            for name in self._shapes:
                kinds = reader.moments(name, self._optim.name, self.updates)
            optimizer.state.clear()
            for flat in self._partitions():
                if self.updates:
                    moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
                    optimizer.state[flat] = {"step": step_counter(optimizer, self.updates), **moments}
            for fragment in self._fragments():
                for kind, view in fragment.values.items():
                    reader.fill(kind, fragment.name, fragment.start, view)
        if self.stage == 3:
            for flat, low in zip(self._partitions(), self._zero.fp16_partitioned_groups_flat, strict=True):
                low.data.copy_(flat.data)
            self._zero.checkpoint_event_epilogue()
        else:
            self._zero.update_lp_params()

    def close(self) -> None:
        self._engine.destroy()
