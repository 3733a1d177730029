"""Several processes that do one job together, as ``torchrun`` starts them."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def join() -> tuple[int, int]:
    """Return this process's rank and how many there are; under ``torchrun`` or ``accelerate launch`` join the others."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return dist.get_rank(), dist.get_world_size()


def _leave() -> None:
    """End the connections to the others: a process that ends with open ones may be aborted."""
    # What its thread holds of the last exchange, gloo gives back under the interpreter's lock, with which torch 2.6 waits
    # here for that very thread.
    time.sleep(0.1)
    dist.destroy_process_group()


def local_device(name: str) -> str:
    """Return the device of this process where ``auto`` was asked for and several share a machine's GPUs."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "auto" and local is not None and torch.cuda.is_available() else name


def agreed(value: Any) -> Any:
    """Return the first process's value, in every process."""
    if not together():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def wait() -> None:
    """Wait for the other processes, so that what the first has written is there when any returns."""
    if together():
        dist.barrier()


def is_first() -> bool:
    """Tell whether this is the first process, or the only one."""
    return not together() or dist.get_rank() == 0


def gathered(value: Any) -> list[Any]:
    """Return every process's value, in the order of their ranks, in every process."""
    if not together():
        return [value]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held


def summed(counts: Tensor) -> Tensor:
    """Return the sum of all processes' tensors."""
    if together():
        dist.all_reduce(counts)
    return counts


def share(items: Sequence[Item], cost: Callable[[Item], float]) -> list[Item]:
    """Return this process's share of the items, in their order; every process gets about the same cost."""
    if not together():
        return list(items)
    loads = [0.0] * dist.get_world_size()
    mine = set()
    for index in sorted(range(len(items)), key=lambda i: (-cost(items[i]), i)):
        least = min(range(len(loads)), key=loads.__getitem__)
        loads[least] += cost(items[index])
        if least == dist.get_rank():
            mine.add(index)
    return [item for index, item in enumerate(items) if index in mine]


def together() -> bool:
    """Tell whether there are other processes."""
    return dist.is_available() and dist.is_initialized()
