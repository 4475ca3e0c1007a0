"""Ranks, agreement between them, and seeds.  The only reader of RANK, WORLD_SIZE and LOCAL_RANK.

Control messages (barriers, agreement, errors) are JSON over gloo on the host, never pickle, so they work beside NCCL
and cannot run code.  With one process everything here is the identity and needs no process group.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as torch_dist

from alignlab.errors import AlignlabError, ConfigError, HangError, StorageError

_control: torch_dist.ProcessGroup | None = None
_timeout: float = 600.0
_set_local_rank = False

LOOPBACK = "127.0.0.1"


def rank() -> int:
    """This process's number over all nodes; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes take part; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on rank 0."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: its own GPU where there is one, else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def init(backend: str = "auto", timeout: float = 600.0, group: bool = False) -> None:
    """Form the process group (``auto``: nccl on GPUs, else gloo); a second call does nothing.

    ``timeout`` is in seconds and holds for every collective.  One process needs no group unless ``group`` asks for one
    (DeepSpeed does); that one lives in memory and opens no port.
    """
    global _control, _timeout, _set_local_rank
    _timeout = timeout
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if torch_dist.is_initialized() or (world_size() == 1 and not group):
        return
    if backend == "auto":
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout)
    if world_size() == 1:
        # DeepSpeed insists on the variable.  It must go again: other libraries take it for a launcher's word.
        _set_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        try:
            store = _loopback_store(limit)
            if store is None:
                torch_dist.init_process_group(backend, timeout=limit)
            else:
                torch_dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=limit)
        except (ValueError, RuntimeError) as error:
            raise HangError(f"rank {rank()} could not join the group of {world_size()} ranks: {_line(error)}") from None
    _control = torch_dist.new_group(backend="gloo", timeout=limit) if backend == "nccl" else torch_dist.group.WORLD


def _loopback_store(limit: timedelta) -> torch_dist.Store | None:
    """Where the ranks of one node meet; None where torchrun has made a place, or there are several nodes.

    torch's own server listens on every address of the machine, and whoever reaches it can disturb the run.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") or os.environ.get("MASTER_ADDR") != LOOPBACK:
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    if rank() > 0:
        return torch_dist.TCPStore(LOOPBACK, port, world_size(), is_master=False, timeout=limit)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError as error:
            raise RuntimeError(f"port {port} of {LOOPBACK}: {error.strerror}") from None
        listener.listen(128)
        return torch_dist.TCPStore(
            LOOPBACK, port, world_size(), is_master=True, timeout=limit, master_listen_fd=listener.detach()
        )


def limit_groups() -> None:
    """Give every process group the timeout of :func:`init`.

    A library that makes groups of its own (DeepSpeed copies the world's) leaves them with torch's half an hour.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=_timeout), group)


def shutdown() -> None:
    """Leave the process group, where there is one."""
    global _control, _set_local_rank
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    if _set_local_rank:
        os.environ.pop("LOCAL_RANK", None)
    _control, _set_local_rank = None, False


def barrier(timeout: float | None = None) -> None:
    """Wait for all ranks; :class:`HangError` naming the missing rank after ``timeout`` seconds."""
    if world_size() == 1:
        return
    try:
        limit = timedelta(seconds=timeout or _timeout)
        torch_dist.monitored_barrier(group=_control, timeout=limit, wait_all_ranks=True)
    except RuntimeError as error:
        raise HangError(f"rank {rank()} waited in vain for the others: {_line(error)}") from None


def all_gather_object(value: Any) -> list[Any]:
    """``value`` (anything JSON can hold) of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    try:
        return [json.loads(bytes(t.tolist())) for t in gather_ragged(mine, _control)]
    except RuntimeError as error:
        raise HangError(f"rank {rank()} lost the others: {_line(error)}") from None


def broadcast_object(value: Any = None, source: int = 0) -> Any:
    """Rank ``source``'s ``value`` (anything JSON can hold), on every rank."""
    return all_gather_object(value if rank() == source else None)[source]


def agree(what: str, value: Any) -> None:
    """Raise a :class:`ConfigError` on every rank unless ``value`` is the same on all of them."""
    values = all_gather_object(value)
    others = [r for r, other in enumerate(values) if other != values[0]]
    if others:
        other = f"rank {others[0]} {values[others[0]]!r}"
        raise ConfigError(f"ranks disagree about {what}: rank 0 has {values[0]!r}, {other}")


def raise_together(error: BaseException | None) -> None:
    """Where any rank comes with an error, raise on all of them, naming the first such rank: nobody waits in vain.

    The kind of an :class:`AlignlabError` is kept; anything else counts as a storage error, for which this is used.
    """
    mine = None if error is None else [type(error).__name__, _line(error)]
    for r, found in enumerate(all_gather_object(mine)):
        if found is not None:
            kinds = {cls.__name__: cls for cls in AlignlabError.__subclasses__()}
            text = f"rank {r}: {found[1]}" if world_size() > 1 else found[1]
            raise kinds.get(found[0], StorageError)(text) from error


def gather_ragged(values: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """1-D tensors of one dtype and any lengths, one a rank, in rank order, on every rank."""
    if world_size() == 1:
        return [values]
    size = torch.tensor([values.numel()], dtype=torch.int64, device=values.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    torch_dist.all_gather(sizes, size, group=group)
    counts = [int(s) for s in sizes]
    padded = values.new_zeros(max(*counts, 1))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in counts]
    torch_dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def lost_rank(error: BaseException) -> bool:
    """Whether an error that escaped a collective says that another rank is gone or hung, not that we have a bug."""
    if isinstance(error, torch_dist.DistError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "onitoredBarrier")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def derive_seed(*keys: int | str | float) -> int:
    """A 63-bit seed from any keys, the same on every machine: BLAKE2b of their JSON text."""
    text = json.dumps(keys, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _line(error: BaseException) -> str:
    """The first line of a message, for errors of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
