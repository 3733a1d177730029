"""Task vectors as matrices, for initializations that look at singular directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mats_hub.initialization.average import average
from mats_hub.initialization.context import Context

MatrixMerge = Callable[[list[Tensor]], Tensor]


def on_matrices(deltas: Sequence[Tensor], weights: Sequence[float], context: Context, merge: MatrixMerge) -> Tensor:
    """Apply `merge` to the task vectors as ``[out, in]`` matrices; what is no matrix gets the average.

    A convolution is flattened to ``[out, in · positions]``, a weight that stacks the matrices of several experts is merged
    one by one, and one that is stored ``[in, out]`` is turned.
    """
    if deltas[0].dim() < 2 or not deltas[0].numel():
        return average(deltas, weights, context)
    if context.stacked:
        parts = zip(*deltas, strict=True)
        inside = Context(context.key, context.experts, context.seed, transposed=context.transposed)
        return torch.stack([on_matrices(part, weights, inside, merge) for part in parts])
    shape = deltas[0].shape
    flat = [delta.flatten(1) for delta in deltas]
    merged = merge([delta.mT if context.transposed else delta for delta in flat])
    return (merged.mT if context.transposed else merged).reshape(shape)


def weighted_sum(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ δᵢ."""
    return torch.stack([matrix * weight for matrix, weight in zip(matrices, weights, strict=True)]).sum(0)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U ``[m, r]``, S ``[r]`` and Vᵀ ``[r, n]`` of a matrix, r its numerical rank.

    The directions beyond it are arbitrary: for the low-rank task vectors of LoRA they would be most of all.
    """
    precise = matrix if matrix.dtype == torch.float64 else matrix.float()
    U, S, Vh = torch.linalg.svd(precise.cpu() if matrix.device.type == "mps" else precise, full_matrices=False)
    limit = S[0] * max(matrix.shape) * torch.finfo(S.dtype).eps if len(S) else S.sum()
    rank = int((limit < S).sum())
    return U[:, :rank].to(matrix), S[:rank].to(matrix), Vh[:rank].to(matrix)


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, within the span of the given ones."""
    U, _, Vh = svd(matrix)
    return U @ Vh
