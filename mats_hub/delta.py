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
    """A task vector scale · B A with B ``[…, out, r]`` and A ``[…, r, in]`` (LoRA, Hu et al. 2022).

    Leading dimensions number the matrices of a weight that stacks several. With `transposed` the weight is stored
    ``[…, in, out]`` (Conv1D, embeddings); `weight_shape` is its stored shape where that is no matrix (convolutions).
    """

    B: Tensor
    A: Tensor
    scale: float
    transposed: bool = False
    weight_shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        """The weight's shape, as it is stored."""
        out, inner = self.B.shape[-2], self.A.shape[-1]
        matrix = (inner, out) if self.transposed else (out, inner)
        return torch.Size(self.weight_shape or (*self.A.shape[:-2], *matrix))

    def dense(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the task vector as one tensor on `device` in `dtype`, multiplied out in `dtype`."""
        product = (self.scale * self.B.to(device, dtype)) @ self.A.to(device, dtype)
        return (product.mT if self.transposed else product).reshape(self.shape).contiguous()

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's stored shape as ``[…, out, in]``, the shape of B A."""
        matrix = weight.flatten(1) if self.weight_shape else weight
        return matrix.mT if self.transposed else matrix


Delta = DenseDelta | LowRankDelta
