"""More than one process: `accelerate launch` starts them, each does its share of every rollout and of every batch.

All of them make the same random draws and hold the same buffer, student and optimizer. The main process writes and speaks.
With one process nothing here does anything, and `torch.distributed` is not started.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from esd_peft.errors import UserError
from esd_peft.runtime import failures, interrupts

BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # devices of which there may be several
PATIENCE = timedelta(minutes=30)  # with a process that lives but does not answer: the first one may be taking images


def start() -> None:
    """Join the processes that the launcher's environment tells of, once; nothing where there is one.

    Raises `UserError` if what it tells makes no sense.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < world or not os.environ["MASTER_ADDR"] or not 0 < int(os.environ["MASTER_PORT"]) < 2**16:
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(
            "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment do not fit together; start with accelerate "
            "launch, or unset RANK for a run of one process"
        ) from None
    if rank == 0:
        print(f"note: this is one of {world} processes, as WORLD_SIZE says; unset RANK for a run of one", file=sys.stderr)
    with _together():
        store, *_ = next(rendezvous("env://", rank, world, timeout=PATIENCE))
        failures.store = store
        kind = next((kind for kind in BACKENDS if torch.get_device_module(kind).is_available()), None)
        backend = f"cpu:gloo,{kind}:{BACKENDS[kind]}" if kind else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The others joined, and at the end left; only the first one speaks on standard output."""
    start()
    with contextlib.ExitStack() as stack:
        if not is_main_process():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """The device `name` for this process: its own GPU of the machine. Raises `UserError` if there are too few."""
    kind, _, number = name.partition(":")
    if world_size() == 1 or kind not in BACKENDS:
        return name
    module = torch.get_device_module(kind)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), module.device_count()
    if number:
        raise UserError(
            f"--device {name} is one GPU, and there are {world_size()} processes; use {kind}, and each takes its own"
        )
    if local >= count:
        raise UserError(
            f"--device {name}: PyTorch sees {count} {kind.upper()} devices, too few for the processes; launch {count}"
        )
    module.set_device(local)
    return f"{kind}:{local}"


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this process writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(count: int) -> range:
    """Return this process's share of `count` items; shares differ by one at most, and may be empty."""
    if world_size() == 1:
        return range(count)
    rank = dist.get_rank()
    return range(rank * count // world_size(), (rank + 1) * count // world_size())


def gather(own: Tensor, count: int, dim: int) -> Tensor:
    """The shares of all processes, in order, along `dim`; `count` in all. Each gets the same bits."""
    if world_size() == 1:
        return own
    largest = -(-count // world_size())
    padded = own.new_zeros(largest, *own.transpose(0, dim).shape[1:])
    padded[: own.shape[dim]] = own.transpose(0, dim)
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    with _together():
        dist.all_gather(parts, padded)
    lengths = [(r + 1) * count // world_size() - r * count // world_size() for r in range(world_size())]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).transpose(0, dim).contiguous()


def all_reduce(values: list[Tensor]) -> None:
    """Replace each by its sum over the processes."""
    if world_size() > 1:
        with _together():
            for work in [dist.all_reduce(value, async_op=True) for value in values]:
                work.wait()


def any_process(flag: bool) -> bool:
    """Return whether `value` is true in any process, for decisions that all processes take at the same step."""
    if world_size() == 1:
        return flag
    shared = torch.tensor(int(flag))
    with _together():
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def stop_together() -> None:
    """Raises `InterruptedBetweenSteps`, in all processes of the run, if a signal was noted in one of them."""
    signals = interrupts.noted_so_far()
    if signals is not None and any_process(bool(signals)):
        raise interrupts.InterruptedBetweenSteps


def broadcast(value: Any) -> Any:
    """The first process's value."""
    if world_size() == 1:
        return value
    shared = [value]
    with _together():
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
    return shared[0]


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Raises `UserError` if a process that took part in it has died, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            "another process of this run has died or does not answer; see what it said and whether its machine ran out of "
            "memory, then add --resume to go on from the last checkpoint, if there is one"
        ) from None
