"""Engines in one process, without DeepSpeed, and what they share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from alignlab import dist
from alignlab.config import EngineConfig, OptimConfig
from alignlab.engine import shards
from alignlab.engine.base import cast_parameters, check, make_engine, resolve_name
from alignlab.engine.optim import clip_, make_optimizer, parameter_groups
from alignlab.errors import ConfigError, StorageError
from alignlab.models.load import DTYPES

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))
from toy import Toy, accumulate, make, micro_batches, train_step


def naive_run(steps: int, dtype: torch.dtype) -> tuple[list[float], Toy]:
    """Whole steps as one sum of losses, torch's own clipping, and for bfloat16 gradients summed by hand in float32."""
    module = Toy()
    cast_parameters(module, dtype)
    masters = {
        p: p.detach().to(torch.float64 if dtype == torch.float64 else torch.float32) for p in module.parameters()
    }
    groups = [[m for m in masters.values() if m.dim() >= 2], [m for m in masters.values() if m.dim() < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    )
    losses = []
    for step in range(steps):
        batches = micro_batches(step)
        total, loss_sum = sum(len(b.targets) for b in batches), 0.0
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for batch in batches:
            loss = -module(batch, None).logps.sum() / total  # type: ignore[arg-type]
            loss_sum += loss.item()
            gradients = torch.autograd.grad(loss, list(masters), allow_unused=True)
            for master, gradient in zip(masters.values(), gradients, strict=True):
                if gradient is not None:
                    master.grad += gradient
        torch.nn.utils.clip_grad_norm_(masters.values(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + step % 3)
        optimizer.step()
        with torch.no_grad():
            for p, master in masters.items():
                p.copy_(master)
        losses.append(loss_sum)
    return losses, module


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_local_engine_equals_a_loop_by_hand(dtype: str) -> None:
    losses, module = naive_run(6, DTYPES[dtype])
    engine = make("local", dtype)
    found = [train_step(engine, step)[0] for step in range(6)]
    assert found == pytest.approx(losses, rel=1e-12 if dtype == "fp64" else 1e-6)
    for name, value in engine.full_state_dict().items():
        assert value.dtype == (torch.float32 if name == "scale" else DTYPES[dtype])
        torch.testing.assert_close(value, module.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert engine.updates == 6


def test_a_plain_bf16_update_would_lose_what_masters_keep() -> None:
    """A change far below bfloat16's spacing survives many steps only in the masters."""
    engine = make("local", "bf16", max_grad_norm=0.0, weight_decay=0.0)
    before = engine.full_state_dict()["embed.weight"]
    for step in range(3):
        accumulate(engine, step)
        engine.step(lr=1e-6)
    assert torch.equal(engine.full_state_dict()["embed.weight"], before)
    for step in range(200):
        accumulate(engine, step % 2)
        engine.step(lr=1e-5)
    assert not torch.equal(engine.full_state_dict()["embed.weight"], before)


def test_fp64_resumes_exactly(tmp_path: Path) -> None:
    engine = make("local", "fp64")
    for step in range(3):
        train_step(engine, step)
    engine.save(tmp_path)
    again = make("local", "fp64", seed=1)
    again.load(tmp_path)
    assert [train_step(again, s) for s in (3, 4)] == [train_step(engine, s) for s in (3, 4)]
    parameters = shards.read_parameters(tmp_path)
    assert parameters["layer.weight"].shape == (19, 19)
    assert parameters["layer.weight"].dtype == torch.float64


def test_zero_and_nan() -> None:
    engine = make("local")
    first = engine.full_state_dict()
    accumulate(engine, 0)
    norms = engine.gradient_norms()
    assert norms["embed.weight"] > 0
    assert norms["unused.bias"] == 0
    assert engine.gradient_norms()["embed.weight"] == 0  # thrown away
    _, norm = train_step(engine, 0, poison=True)
    assert norm != norm
    assert all(torch.equal(v, first[k]) for k, v in engine.full_state_dict().items())
    assert engine.updates == 0


@pytest.mark.parametrize(
    ("name", "dtype", "ranks", "options", "says"),
    [
        ("zero0", "bf16", 1, {}, "use engine=zero1"),
        ("zero2", "fp64", 1, {}, "needs engine=local"),
        ("local", "fp32", 2, {}, "one process, there are 2"),
        ("local", "fp32", 1, {"offload_optimizer": True}, "needs engine=zero1, zero2 or zero3"),
        ("zero0", "fp32", 1, {"offload_optimizer": True}, "needs engine=zero1, zero2 or zero3"),
    ],
)
def test_what_cannot_work_is_refused(name: str, dtype: str, ranks: int, options: dict[str, bool], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(name, OptimConfig(), EngineConfig(name, **options), DTYPES[dtype], ranks)


def test_more_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cuts its blocks apart"):
        check("zero2", OptimConfig("adamw_8bit"), EngineConfig(), torch.float32, 2)
    with pytest.raises(ConfigError, match="unknown engine 'zero4'"):
        make_engine("zero4", Toy(), OptimConfig(), EngineConfig(), torch.float32)
    with pytest.raises(ConfigError, match="unknown optimizer 'sgd'"):
        make("local", name="sgd")
    with pytest.raises(ConfigError, match="no parameter of the model is trainable"):
        make_engine("local", Toy().requires_grad_(False), OptimConfig(), EngineConfig(), torch.float32)
    with pytest.raises(ConfigError, match="does not support it"):
        make_engine("local", Toy(), OptimConfig(), EngineConfig(), torch.float32, gradient_checkpointing=True)
    assert resolve_name("auto", 1) == "local"
    assert resolve_name("auto", 8) == "zero2"


def test_state_of_something_else_is_refused(tmp_path: Path) -> None:
    engine = make("local", adapter=True)
    train_step(engine, 0)
    engine.save(tmp_path)
    refused = {
        "its dtype is torch.float32, this run's is torch.bfloat16": make("local", "bf16", adapter=True),
        "its optimizer is adamw, this run's is rmsprop": make("local", adapter=True, name="rmsprop"),
        "its frozen is": make("local", adapter=True, seed=1),  # another base model under the same adapter
    }
    for says, other in refused.items():
        with pytest.raises(ConfigError, match=says):
            other.load(tmp_path)
    with pytest.raises(ConfigError, match="its frozen is"):
        make("local").load(tmp_path)
    make("local", adapter=True).load(tmp_path)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    engine = make("local")
    engine.save(tmp_path)
    other = Toy()
    other.layer = torch.nn.Linear(19, 19, bias=False)
    with pytest.raises(ConfigError, match=r"parameter layer.bias is trained there with shape \[19\], here with None"):
        make_engine("local", other, OptimConfig(), EngineConfig(), torch.float32).load(tmp_path)


def test_fragments_meet_again_however_they_were_cut(tmp_path: Path) -> None:
    whole = torch.arange(50, dtype=torch.float32)
    for rank, (low, high) in enumerate([(0, 7), (7, 7), (7, 31), (31, 50)]):
        fragment = shards.Fragment("a:b", low, {"param": whole[low:high], "exp_avg": -whole[low:high]})
        shards.write_shard(tmp_path, rank, [fragment])
    with shards.ShardReader(tmp_path) as reader:
        assert reader.names() == {"a:b"}
        assert reader.kinds("a:b") == {"exp_avg"}
        assert torch.equal(reader.whole("exp_avg", "a:b"), -whole)
        for low in range(50):
            for high in range(low + 1, 51):
                out = torch.empty(high - low)
                reader.fill("param", "a:b", low, out)
                assert torch.equal(out, whole[low:high])
        with pytest.raises(StorageError, match="has 1 of 2 elements"):
            reader.fill("param", "a:b", 49, torch.empty(2))
        with pytest.raises(StorageError, match="missing"):
            reader.whole("param", "c")


def test_broken_state_is_a_storage_error(tmp_path: Path) -> None:
    engine = make("local")
    with pytest.raises(StorageError, match=r"engine\.json"):
        engine.load(tmp_path)
    engine.save(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StorageError, match="shard-00000"):
        engine.load(tmp_path)
    shard.unlink()
    with pytest.raises(StorageError, match="no shard"):
        engine.load(tmp_path)


def test_clip_is_torchs() -> None:
    torch.manual_seed(0)
    for limit in (0.5, 100.0):
        mine = [torch.randn(4, 3), torch.randn(7)]
        theirs = [torch.nn.Parameter(t.clone()) for t in mine]
        for p, t in zip(theirs, mine, strict=True):
            p.grad = t.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
        assert clip_(mine, limit) == norm.item()
        assert all(p.grad is not None and torch.equal(p.grad, t) for p, t in zip(theirs, mine, strict=True))
    untouched = torch.ones(3)
    assert clip_([untouched], 0.0) == pytest.approx(3**0.5)
    assert torch.equal(untouched, torch.ones(3))
    assert clip_([torch.full((2,), torch.inf)], 1.0) == float("inf")


def test_vectors_do_not_decay() -> None:
    groups = parameter_groups(Toy(), 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"])  # type: ignore[attr-defined]
    assert all(p.dim() == 1 for p in groups[1]["params"])  # type: ignore[attr-defined]
    assert len(parameter_groups(Toy(), 0.0)) == 1
    optimizer = make_optimizer(parameter_groups(Toy(), 0.0), OptimConfig("rmsprop", alpha=0.9))
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert optimizer.param_groups[0]["alpha"] == 0.9


def test_seeds_never_change() -> None:
    assert dist.derive_seed(0, "order", 1) == 8564744908326564245
    seen = {dist.derive_seed(seed, step) for seed in range(30) for step in range(30)}
    assert len(seen) == 900
    assert all(0 <= s < 2**63 for s in seen)
    assert dist.derive_seed(1, 23) != dist.derive_seed(12, 3)
    assert dist.derive_seed("1") != dist.derive_seed(1)


def test_alone_collectives_are_the_identity() -> None:
    engine = make("local")
    values = torch.arange(3.0)
    assert torch.equal(engine.gather(values), values)
    assert engine.reduce(values) is not values
    assert dist.broadcast_object({"a": [1]}) == {"a": [1]}
    dist.barrier()
    dist.agree("anything", 1)
    with pytest.raises(ConfigError, match=r"^first line$"):
        dist.raise_together(ConfigError("first line\nsecond"))
    with pytest.raises(StorageError, match=r"^disk$"):
        dist.raise_together(OSError("disk"))
    assert not torch.distributed.is_initialized()


def test_lost_ranks_are_told_from_bugs() -> None:
    assert dist.lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"))
    assert dist.lost_rank(RuntimeError("Timed out waiting 5000ms for recv operation to complete"))
    assert not dist.lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not dist.lost_rank(ValueError("Timed out waiting"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    import os
    import signal
    import subprocess
    import time

    worker = "import os, time; from alignlab.processes import *; die_with_parent(); print(os.getpid(), flush=True); "
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker + 'time.sleep(60)'!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().split()[2] == "Z":  # dead, and whoever inherited it has not looked
            break
        time.sleep(0.05)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the worker outlived its parent")
