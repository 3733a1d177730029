"""Measuring on several processes: each takes every n-th batch, and the sums are added up."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist

from mats_hub.statistics.accumulate import Sums


def join() -> tuple[int, int]:
    """Return this process's rank and how many there are; under ``torchrun`` or ``accelerate launch`` join the others."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)  # a process that ends with open connections may be aborted
    return dist.get_rank(), dist.get_world_size()


def local_device(name: str) -> str:
    """Return the device of this process where ``auto`` was asked for and several share a machine's GPUs."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "auto" and local is not None and torch.cuda.is_available() else name


def agreed(value: Any) -> Any:
    """Return the first process's value, in every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def wait() -> None:
    """Wait for the other processes, so that what the first has written is there when any returns."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def total(sums: Sums, device: torch.device) -> Sums:
    """Return the sums of all processes; every process gets them.

    Sums are held in float64 and every batch adds numbers of float32 to them, so that the order of adding changes nothing.
    """
    mine = {key: (tuple(value.shape), value.dtype) for key, value in sums.tensors.items()}
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, (mine, sums.tokens, sums.aliases, sums.uses, sums.examples))
    found = Sums(probes=sums.probes)
    for shapes, tokens, aliases, uses, examples in told:
        for module, count in tokens.items():
            found.tokens[module] = found.tokens.get(module, 0) + count
        for parameter, held in uses.items():
            for kind, module in held:
                found.use(parameter, kind, module)
        found.aliases |= aliases
        found.examples += examples
        for key, (shape, dtype) in shapes.items():
            if key not in found.tensors:
                held = sums.tensors.get(key)
                found.tensors[key] = held if held is not None else torch.zeros(shape, dtype=dtype, device=device)
    for key in sorted(found.tensors):
        dist.all_reduce(found.tensors[key])
    return found
