"""Plain torch in one process: the engine that the others are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from alignlab.config import OptimConfig
from alignlab.engine import shards
from alignlab.engine.base import Collectives, check_state, frozen_hash, trainable
from alignlab.engine.optim import clip_, logged_norm, make_optimizer, parameter_groups, set_learning_rate, usable
from alignlab.types import Ask, PackedBatch, Scores, StepInfo


class LocalEngine(Collectives):
    """One process, one device.  Bfloat16 parameters get float32 masters and float32 gradient sums."""

    name = "local"
    dp = 1
    rank = 0

    def __init__(self, module: nn.Module, optim: OptimConfig, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self.updates = 0
        self._optim = optim
        self._parameters = dict(trainable(module))
        self._frozen = frozen_hash(module)
        groups = parameter_groups(module, optim.weight_decay)
        self._masters: dict[nn.Parameter, Tensor] = {}
        self._hooks = []
        for p in self._parameters.values():
            if p.dtype in (torch.bfloat16, torch.float16):
                self._masters[p] = p.detach().float().clone()
                self._hooks.append(p.register_post_accumulate_grad_hook(self._accumulate))
        for group in groups:
            group["params"] = [self._masters.get(p, p) for p in group["params"]]  # type: ignore[attr-defined]
        self._optimizer = make_optimizer(groups, optim)

    def _accumulate(self, parameter: nn.Parameter) -> None:
        """Move a fresh low-precision gradient into its master's float32 sum."""
        master, gradient = self._masters[parameter], parameter.grad
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    def _updated(self, parameter: nn.Parameter) -> Tensor:
        return self._masters.get(parameter, parameter)

    def score(self, batch: PackedBatch, ask: Ask) -> Scores:
        return self.module(batch, ask)

    def backward(self, loss: Tensor, last: bool = False) -> None:
        loss.backward()

    def step(self, lr: float) -> StepInfo:
        tensors = [self._updated(p) for p in self._parameters.values()]
        for tensor in tensors:
            if tensor.grad is None:  # ZeRO updates (and decays) unused parameters too, with a gradient of zero
                tensor.grad = torch.zeros_like(tensor)
        norm = clip_([t.grad for t in tensors if t.grad is not None], self._optim.max_grad_norm)
        finite = usable(norm)
        if finite:
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            self._refresh()
            self.updates += 1
        self.zero()
        return StepInfo(grad_norm=logged_norm(norm), updated=finite)

    @torch.no_grad()
    def _refresh(self) -> None:
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def zero(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def gradient_norms(self) -> dict[str, float]:
        pairs = ((name, self._updated(p).grad) for name, p in self._parameters.items())
        norms = {name: 0.0 if g is None else torch.linalg.vector_norm(g).item() for name, g in pairs}
        self.zero()
        return norms

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def _describe(self) -> dict[str, object]:
        return {
            "dtype": str(next(iter(self._parameters.values())).dtype),
            "optimizer": self._optim.name,
            "frozen": self._frozen,
            "shapes": {name: list(p.shape) for name, p in self._parameters.items()},
        }

    def _fragments(self) -> list[shards.Fragment]:
        return whole_fragments(self._parameters, self._masters, self._optimizer)

    def state_bytes(self) -> int:
        return shards.byte_count(self._fragments())

    def save(self, folder: Path) -> None:
        shards.write_shard(folder, 0, self._fragments())
        shards.write_state(folder, {**self._describe(), "engine": self.name, "ranks": 1, "updates": self.updates})

    def load(self, folder: Path) -> None:
        state = shards.read_state(folder)
        check_state(state, self._describe(), folder)
        load_whole(folder, self._parameters, self._masters, self._optimizer, self._optim.name, state["updates"])
        self._refresh()
        self.updates = state["updates"]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.zero()


def whole_fragments(
    parameters: dict[str, nn.Parameter],
    masters: dict[nn.Parameter, Tensor],
    optimizer: torch.optim.Optimizer,
    part: int = 0,
    parts: int = 1,
) -> list[shards.Fragment]:
    """State of an engine that holds whole tensors; of several equal copies, copy ``part`` writes every ``parts``-th."""
    fragments = []
    for number, (name, parameter) in enumerate(parameters.items()):
        if number % parts == part:
            tensor = masters.get(parameter, parameter)
            state = optimizer.state.get(tensor, {})
            values = {k: v.reshape(-1) for k, v in state.items() if isinstance(v, Tensor) and k != "step"}
            fragments.append(shards.Fragment(name, 0, {shards.PARAMETER: tensor.detach().reshape(-1), **values}))
    return fragments


@torch.no_grad()
def load_whole(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    masters: dict[nn.Parameter, Tensor],
    optimizer: torch.optim.Optimizer,
    optimizer_name: str,
    updates: int,
) -> None:
    """The counterpart of :func:`whole_fragments`, from anybody's shards."""
    optimizer.state.clear()
    with shards.ShardReader(folder) as reader:
        for name, parameter in parameters.items():
            tensor = masters.get(parameter, parameter)
            reader.fill(shards.PARAMETER, name, 0, tensor.data.view(-1))
            kinds = reader.moments(name, optimizer_name, updates)
            if updates:
                state = optimizer.state[tensor]
                state["step"] = step_counter(optimizer, updates)
                for kind in kinds:
                    value = reader.whole(kind, name).to(tensor.device)
                    state[kind] = value.reshape(tensor.shape) if value.numel() == tensor.numel() else value


def step_counter(optimizer: torch.optim.Optimizer, updates: int) -> Tensor | int:
    """What the optimizer counts its updates in: torch's in a float32 scalar, bitsandbytes' in an int."""
    return torch.tensor(float(updates)) if isinstance(optimizer, (torch.optim.AdamW, torch.optim.RMSprop)) else updates
