"""Deltas (task vectors): expert minus base for one weight, dense or as the factors of a LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseDelta:
    """A task vector as one tensor in the weight's shape."""

    value: Tensor

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.value.shape

    def dense(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the task vector as one tensor on `device` in `dtype`."""
        return self.value.to(device, dtype)


@dataclass(frozen=True)
class LowRankDelta:
    """A task vector scale · B A with B ``[out, r]`` and A ``[r, in]`` (LoRA, Hu et al. 2022).

    With `transposed` the weight is stored ``[in, out]`` (Conv1D) and the dense form is transposed to match.
    """

    B: Tensor
    A: Tensor
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """The weight's shape, as it is stored."""
        out, inner = self.B.shape[0], self.A.shape[1]
        return torch.Size((inner, out) if self.transposed else (out, inner))

    def dense(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the task vector as one tensor on `device` in `dtype`, multiplied out in `dtype`."""
        product = (self.scale * self.B.to(device, dtype)) @ self.A.to(device, dtype)
        return product.T.contiguous() if self.transposed else product


Delta = DenseDelta | LowRankDelta
