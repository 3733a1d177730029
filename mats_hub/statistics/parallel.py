"""Measuring on several processes: each takes every n-th batch, and the sums are added up."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mats_hub.statistics.accumulate import Sums


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
