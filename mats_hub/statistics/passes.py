"""Measuring in passes over the data, of as many parameters each as memory has room for, taken up again where they stopped."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from mats_hub.statistics.accumulate import Sums
from mats_hub.statistics.collect import Survey
from mats_hub.statistics.storage import StoredTensors, read_sums, write_sums
from mats_hub.statistics.watch import MAX_FEATURES

BYTES = 8
"""Of an entry of a sum while it is added to."""

SHARE = 0.6
"""Of the free memory, for sums; the rest is for activations."""

SAVE_EVERY = 60.0
"""Seconds between two records of how far a pass is; more where writing one takes long."""


def free_memory(device: Any, processes: int = 1) -> float:
    """Return the bytes that are free for sums on a device, which on a CPU several processes share."""
    import psutil
    import torch

    if device.type == "cuda":
        return SHARE * torch.cuda.mem_get_info(device)[0]
    return SHARE * psutil.virtual_memory().available / processes


def costs(
    model: nn.Module, seen: Survey | None, kinds: Collection[str], only: Collection[str] | None, rank: int | None
) -> list[tuple[set[str], int]]:
    """Return the parameters that have to be measured together, in the model's order, and the bytes that their sums take.

    Together are parameters whose modules read the same input, and several parameters of one module.
    """
    groups: dict[str, tuple[set[str], int]] = {}
    grams = seen is not None and ("gram" in kinds or "kfac" in kinds)
    uses, aliases = (seen.found.uses, seen.aliases) if seen and grams else ({}, {})
    joined: dict[str, str] = {}

    def root(module: str) -> str:
        module = aliases.get(module, module)
        while module in joined:
            module = joined[module]
        return module

    for name in uses:
        first, *others = (root(module) for _, module in uses[name])
        joined |= {root(other): first for other in others if root(other) != first}
    counted: set[str] = set()
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        size = parameter.numel() if "fisher" in kinds else 0
        if "block_fisher" in kinds and parameter.numel() == max(parameter.shape, default=0):
            size += parameter.numel() ** 2
        for kind, module in uses.get(name, ()):
            if module not in counted:
                counted.add(module)
                assert seen is not None
                size += _entries(seen, module, kind, parameter, "kfac" in kinds, rank)
        if not size and name not in uses:
            continue
        key = root(uses[name][0][1]) if name in uses else name
        names, before = groups.get(key, (set(), 0))
        groups[key] = (names | {name}, before + BYTES * size)
    return list(groups.values())


def _entries(seen: Survey, module: str, kind: str, parameter: nn.Parameter, gradients: bool, rank: int | None) -> int:
    """Return how many entries the sums of one use of a parameter have."""
    if module in seen.widths:
        read = 0 if module in seen.aliases else seen.widths[module]
        written = seen.out_widths.get(module, 0) if gradients else 0
        return sum(side * (side if rank is None else min(rank, side) + 1) for side in (read, written))
    if kind in ("linear", "experts"):
        stack, sides = (len(parameter) if parameter.dim() == 3 else 1), parameter.shape[-2 if gradients else -1 :]
        return stack * sum(side * side for side in sides if side <= MAX_FEATURES)
    return 3 * max(parameter.shape)


def divide(groups: Iterable[tuple[set[str], int]], room: float) -> list[list[str]]:
    """Return the parameters of each pass: groups in their order, as many as there is room for, but at least one."""
    passes: list[list[str]] = []
    left = 0.0
    for names, size in groups:
        if not passes or size > left:
            passes.append([])
            left = room
        passes[-1] += sorted(names)
        left -= size
    return passes


class Record:
    """What is done of a measurement, in a folder beside the file that it is for, so that it can be taken up again.

    Args:
        output: the file; nothing is recorded when there is none.
        settings: what the sums depend on: what was recorded under others is thrown away.
        process: this process's number; each has files of its own.

    """

    def __init__(self, output: Path | None, settings: Iterable[str], process: int = 0) -> None:
        self._folder = output and output.with_name(f".{output.name}.progress")
        self._process, self._saved, self._cost = process, time.monotonic(), 0.0
        self._passes: list[list[str]] = []
        self._digest = hashlib.sha256("\0".join(settings).encode()).hexdigest()

    def passes(self, proposed: list[list[str]]) -> list[list[str]]:
        """Return the passes of what was recorded, and where nothing was, those proposed: free memory is never the same twice."""
        found = read_sums(self._file(0)) if self._folder else None
        known = found is not None and found[1].get("settings") == self._digest
        self._passes = found[1]["passes"] if found and known else proposed
        return self._passes

    def load(self, number: int) -> tuple[Sums, int] | None:
        """Return the sums that were recorded of a pass, and the number of batches that they are of."""
        found = read_sums(self._file(number)) if self._folder else None
        if found is None or found[1].get("settings") != self._digest:
            return None
        return found[0], int(found[1]["batches"])

    def save(self, number: int, sums: Sums, batches: int, now: bool = False) -> None:
        """Record a pass after so many batches, if the last record is old enough."""
        started = time.monotonic()
        if self._folder and (now or started - self._saved >= SAVE_EVERY + 20 * self._cost):
            write_sums(sums, self._file(number), {"settings": self._digest, "batches": batches, "passes": self._passes})
            self._saved = time.monotonic()
            self._cost = self._saved - started

    def finished(self, number: int, sums: Sums) -> Sums:
        """Put the finished sums of one of several passes on disk, and return them as they are there."""
        if self._folder is None:
            return sums
        path = self._folder / f"finished-{number}-{self._process}.safetensors"
        write_sums(sums, path, {})
        sums.tensors = {}  # whoever still holds them need not keep them in memory while the next pass is measured
        return Sums(**{**vars(sums), "tensors": StoredTensors(path)})

    def clear(self) -> None:
        """Remove everything recorded."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number}-{self._process}.safetensors"
