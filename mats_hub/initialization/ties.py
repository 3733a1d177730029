"""TIES-Merging: trim, elect sign, disjoint mean (Yadav et al. 2023, https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context


def ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    scale: float = 1.0,
    density: float = 0.2,
    trim: str = "global",
    fuse: str = "mean",
) -> Tensor:
    """Return scale · (mean over the experts that agree with the elected sign), in the deltas' shape.

    1. Trim: of each expert keep the largest `density` of its entries by magnitude, over its whole task vector
       (`context.thresholds`, as in the paper) or, without them, over this weight alone.
    2. Elect: the sign of Σ wᵢ δᵢ per entry; a sum of exactly zero elects +.
    3. Merge: Σ wᵢ δᵢ / Σ wᵢ over the experts whose entry is kept and has the elected sign; with `fuse` ``sum``, Σ wᵢ δᵢ.

    `trim` says which of the two the recipe asks for; it acts through `context.thresholds`.
    """
    cuts = context.thresholds or tuple(_threshold(delta, density) for delta in deltas)
    return scale * elect([trimmed(delta, cut) for delta, cut in zip(deltas, cuts, strict=True)], weights, fuse)


def trimmed(delta: Tensor, cut: float) -> Tensor:
    """Return the entries whose magnitude is `cut` at least, and 0 for the others.

    Magnitudes are ranked and compared in float32: rounding must not put an entry under its own threshold.
    """
    if delta.dtype != torch.float32:
        return torch.where(delta.abs().float() >= cut, delta, 0)
    below = torch.tensor(cut, dtype=torch.float32).nextafter(torch.zeros(()))
    return torch.nn.functional.hardshrink(delta, float(below))  # many times faster than `where`


def elect(deltas: Sequence[Tensor], weights: Sequence[float], fuse: str) -> Tensor:
    """Return, per entry, the weighted mean or sum of those deltas that are not zero and have the sign of Σ wᵢ δᵢ."""
    # Arithmetic alone: choosing by a boolean is an order of magnitude slower on a CPU, where the signs are like dice.
    weighted = [delta if weight == 1 else delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    total = weighted[0] + 0.0  # of −0, too, + is elected
    for delta in weighted[1:]:
        total += delta
    elected = torch.copysign(torch.ones_like(total), total)
    total, mass = total.zero_(), torch.zeros_like(total)
    for delta, weight in zip(weighted, weights, strict=True):
        agreeing = (delta * elected).relu_()
        total += agreeing
        if fuse != "sum":
            mass.add_(agreeing.sign_(), alpha=abs(weight))
    if fuse != "sum":
        total /= mass.clamp_(min=min((abs(weight) for weight in weights if weight), default=1.0))
    return total.mul_(elected)


def kept_rank(count: int, density: float) -> int:
    """Return which smallest magnitude (1-based) is the first one kept of `count` entries; 1 keeps all.

    The rule of the authors' code, deterministic under equal magnitudes: entries at least as large as the
    (count − int(count · density))-th smallest stay.
    """
    return max(1, count - int(count * density))


def _threshold(delta: Tensor, density: float) -> float:
    if delta.numel() == 0:
        return 0.0
    return float(delta.abs().flatten().float().kthvalue(kept_rank(delta.numel(), density)).values)


class MagnitudeRank:
    """The k-th smallest magnitude of a vector too large to hold, exact, in two streaming passes.

    The bits of a non-negative float32 grow with its value, so the magnitude's upper 16 bits are counted in a first pass
    and, inside the one bin that holds the k-th, the lower 15 bits in a second. Memory: 64 Ki counters.

    Use: `add` every part; `narrow`; `add` every part again; `value`. The `counts` of several ranks, each with parts of its own,
    may be summed before `narrow` and before `value`.
    """

    LOW_BITS = 15

    def __init__(self, density: float) -> None:
        self._density = density
        self.counts = torch.zeros(1 << 16, dtype=torch.int64)
        self._bin: int | None = None
        self._rank = 0

    def add(self, part: Tensor) -> None:
        """Count the magnitudes of a part, of any shape."""
        self.counts += self.counted(part)

    def counted(self, part: Tensor) -> Tensor:
        """Return the counts of a part, which `add` adds up."""
        bits = part.detach().to(torch.float32).abs().flatten().view(torch.int32)
        if self._bin is None:
            return torch.bincount(bits >> self.LOW_BITS, minlength=1 << 16).cpu()
        inside = (bits >> self.LOW_BITS) == self._bin
        if bits.numel() % 8 == 0:  # few are: eight at a time are looked at first, as one integer
            bits = bits.view(-1, 8)[inside.view(torch.int64).nonzero().squeeze(1)]
            inside = (bits >> self.LOW_BITS) == self._bin
        low = bits[inside] & ((1 << self.LOW_BITS) - 1)
        return torch.bincount(low, minlength=1 << self.LOW_BITS).cpu()

    def narrow(self) -> None:
        """End the first pass: find the bin that holds the wanted rank."""
        count = int(self.counts.sum())
        self._bin, self._rank = self._locate(kept_rank(count, self._density) if count else 0)
        self.counts = torch.zeros(1 << self.LOW_BITS, dtype=torch.int64)

    def value(self) -> float:
        """End the second pass: the magnitude of the wanted rank (0 for an empty vector)."""
        if self._bin is None:
            raise RuntimeError("MagnitudeRank.value before narrow()")
        if self._rank == 0:
            return 0.0
        low, _ = self._locate(self._rank)
        bits = torch.tensor([(self._bin << self.LOW_BITS) | low], dtype=torch.int32)
        value = float(bits.view(torch.float32))
        return value if math.isfinite(value) else math.inf

    def _locate(self, rank: int) -> tuple[int, int]:
        """Return the bin that holds the 1-based rank, and the rank inside it."""
        if rank == 0:
            return 0, 0
        cumulative = self.counts.cumsum(0)
        position = int(torch.searchsorted(cumulative, rank))
        return position, rank - (int(cumulative[position - 1]) if position else 0)
