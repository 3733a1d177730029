"""Masks as bits: eight entries in a byte, written and read part by part (TALL-masks, https://arxiv.org/abs/2405.07813)."""

from __future__ import annotations

import torch
from torch import Tensor

POWERS = (128, 64, 32, 16, 8, 4, 2, 1)


def pack(mask: Tensor) -> Tensor:
    """Return a mask of any shape as bytes, ``[⌈n / 8⌉]`` uint8, the first entry in the highest bit, padded with zeros."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    return (padded * torch.tensor(POWERS, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` entries of packed bytes, ``[count]`` bool."""
    if not 0 <= count <= 8 * len(packed):
        raise ValueError(f"{len(packed)} bytes do not hold {count} entries")
    bits = packed[:, None] & torch.tensor(POWERS, dtype=torch.uint8, device=packed.device)
    return (bits != 0).flatten()[:count]


class Packer:
    """Packs masks that come one after the other, as if they were one."""

    def __init__(self) -> None:
        self._left = torch.zeros(0, dtype=torch.bool)
        self.count = 0
        self.kept = 0

    def add(self, mask: Tensor) -> bytes:
        """Return the bytes that are full after a further mask."""
        flat = torch.cat([self._left, mask.flatten().cpu()])
        whole = len(flat) // 8 * 8
        self._left = flat[whole:]
        self.count += mask.numel()
        self.kept += int(mask.sum())
        return pack(flat[:whole]).numpy().tobytes()

    def end(self) -> bytes:
        """Return the last byte, if it is not full."""
        return pack(self._left).numpy().tobytes()
