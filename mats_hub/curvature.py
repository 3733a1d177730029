"""Curvatures: symmetric positive-semidefinite linear maps that say which directions of a weight matter to a task.

A weight θ of a linear module has shape ``[out, in]``, as PyTorch stores it, and nothing is ever flattened or transposed:
an input Gram A ``[in, in]`` acts from the right (V A), an output Gram B ``[out, out]`` from the left (B V). Inner products
are ``(a * b).sum()``. Where one parameter stacks the weights of several experts, ``[experts, out, in]``, Grams are stacked the
same way. ``+`` is always exact: it stays in a class that is closed under addition and is a `Sum` otherwise.
Adding the factors of two Kronecker products would be wrong, so that is never done. Damping is written out as
``curvature + Identity(λ)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


class Curvature(ABC):
    """A symmetric positive-semidefinite linear map C on tensors shaped like one weight."""

    @abstractmethod
    def matvec(self, value: Tensor) -> Tensor:
        """Return C · value, in the shape of `value`."""

    def add_matvec(self, total: Tensor, value: Tensor) -> Tensor:
        """Return total + C · value; what is in `total` may be lost."""
        return total.add_(self.matvec(value))

    @abstractmethod
    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return the diagonal of C for a weight of this shape, in that shape."""

    @abstractmethod
    def scaled(self, factor: float) -> Curvature:
        """Return factor · C; `factor` must not be negative."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype) -> Curvature:
        """Return the same map, stored on `device` in `dtype`."""

    def __add__(self, other: Curvature) -> Curvature:
        terms = (*_terms(self), *_terms(other))
        total = [terms[0]]
        for term in terms[1:]:
            for position, held in enumerate(total):
                joined = _closed_sum(held, term)
                if joined is not None:
                    total[position] = joined
                    break
            else:
                total.append(term)
        return total[0] if len(total) == 1 else Sum(tuple(total))


@dataclass(frozen=True)
class Identity(Curvature):
    """C = scale · I: every direction matters alike, which gives the average of the experts.

    Of stacked weights, the scale is a tensor with one number for each.
    """

    scale: float | Tensor = 1.0

    def matvec(self, value: Tensor) -> Tensor:
        """Return scale · value."""
        return self.scale * value

    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return a tensor filled with the scale."""
        return torch.as_tensor(self.scale).expand(shape)

    def scaled(self, factor: float) -> Identity:
        """Return factor · C."""
        return Identity(self.scale * _nonnegative(factor))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Identity:
        """Return itself: nothing is stored."""
        return self


@dataclass(frozen=True)
class Diagonal(Curvature):
    """C = diag(d), for instance the diagonal of the Fisher (Matena & Raffel 2022); d has the weight's shape."""

    values: Tensor

    def matvec(self, value: Tensor) -> Tensor:
        """Return d * value."""
        return self.values * value

    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return d."""
        return self.values.expand(shape)

    def scaled(self, factor: float) -> Diagonal:
        """Return factor · C."""
        return Diagonal(self.values * _nonnegative(factor))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Diagonal:
        """Return the same map on `device` in `dtype`."""
        return Diagonal(self.values.to(device, dtype))


@dataclass(frozen=True)
class Gram(Curvature):
    """C = I ⊗ A with A ``[in, in]`` the input Gram E[x xᵀ]: V ↦ V A (RegMean, Jin et al. 2023)."""

    matrix: Tensor

    def matvec(self, value: Tensor) -> Tensor:
        """Return value · A."""
        return value @ self.matrix

    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return the diagonal of A in every row."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).expand(shape)

    def scaled(self, factor: float) -> Gram:
        """Return factor · C."""
        return Gram(self.matrix * _nonnegative(factor))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Gram:
        """Return the same map on `device` in `dtype`."""
        return Gram(self.matrix.to(device, dtype))


@dataclass(frozen=True)
class LowRank(Curvature):
    """C = I ⊗ (F Fᵀ + diag(d)), a sketched Gram: V ↦ V F Fᵀ + V diag(d), with F ``[in, q]`` and d ``[in]``."""

    factor: Tensor
    rest: Tensor

    def matvec(self, value: Tensor) -> Tensor:
        """Return value · (F Fᵀ + diag(d))."""
        return ((value @ self.factor) @ self.factor.mT).addcmul_(value, self.rest.unsqueeze(-2))

    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return the diagonal of F Fᵀ + diag(d) in every row."""
        return diagonal_of(self).unsqueeze(-2).expand(shape)

    def scaled(self, factor: float) -> LowRank:
        """Return factor · C."""
        return LowRank(self.factor * _nonnegative(factor) ** 0.5, self.rest * factor)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRank:
        """Return the same map on `device` in `dtype`."""
        return LowRank(self.factor.to(device, dtype), self.rest.to(device, dtype))

    def dense(self) -> Gram:
        """Return the same map with its matrix written out."""
        return Gram(self.factor @ self.factor.mT + torch.diag_embed(self.rest))


@dataclass(frozen=True)
class Kronecker(Curvature):
    """C = B ⊗ A with B ``[out, out]`` = E[g gᵀ] and A ``[in, in]`` = E[x xᵀ]: V ↦ B V A (K-FAC, Martens & Grosse 2015).

    Either is a matrix, or a sketch of it, which is not written out.
    """

    output: Tensor | LowRank
    input: Tensor | LowRank

    def matvec(self, value: Tensor) -> Tensor:
        """Return B · value · A."""
        left = _from_left(self.output, value)
        return left @ self.input if isinstance(self.input, Tensor) else self.input.matvec(left)

    def add_matvec(self, total: Tensor, value: Tensor) -> Tensor:
        """Return total + B · value · A, added by the last product itself."""
        left = _from_left(self.output, value)
        if isinstance(self.input, Tensor):
            return _add_product(total, left, self.input)
        factor = self.input.factor
        return _add_product(total, left @ factor, factor.mT).addcmul_(left, self.input.rest.unsqueeze(-2))

    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return the outer product of the diagonals of B and A."""
        rows, columns = diagonal_of(self.output), diagonal_of(self.input)
        return rows.unsqueeze(-1) * columns.unsqueeze(-2)

    def scaled(self, factor: float) -> Kronecker:
        """Return factor · C."""
        scaled = self.output * _nonnegative(factor) if isinstance(self.output, Tensor) else self.output.scaled(factor)
        return Kronecker(scaled, self.input)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Kronecker:
        """Return the same map on `device` in `dtype`."""
        return Kronecker(self.output.to(device, dtype), self.input.to(device, dtype))

    def dense(self) -> Kronecker:
        """Return the same map with its sketches written out."""
        return Kronecker(written_out(self.output), written_out(self.input))


@dataclass(frozen=True)
class Dense(Curvature):
    """C as a full matrix ``[n, n]`` over the n entries of the weight, for small ones such as (IA)³ vectors."""

    matrix: Tensor

    def matvec(self, value: Tensor) -> Tensor:
        """Return C · vec(value) in the shape of `value`."""
        return (self.matrix @ value.reshape(-1)).reshape(value.shape)

    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return the diagonal of C in the weight's shape."""
        return self.matrix.diagonal().reshape(shape)

    def scaled(self, factor: float) -> Dense:
        """Return factor · C."""
        return Dense(self.matrix * _nonnegative(factor))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Dense:
        """Return the same map on `device` in `dtype`."""
        return Dense(self.matrix.to(device, dtype))


@dataclass(frozen=True)
class Sum(Curvature):
    """C = Σ Cⱼ, kept as its terms because they have no closed sum."""

    terms: tuple[Curvature, ...]

    def matvec(self, value: Tensor) -> Tensor:
        """Return Σ Cⱼ · value."""
        total = self.terms[0].matvec(value)
        for term in self.terms[1:]:
            total = term.add_matvec(total, value)
        return total

    def diagonal(self, shape: torch.Size) -> Tensor:
        """Return the sum of the terms' diagonals."""
        total = self.terms[0].diagonal(shape)
        for term in self.terms[1:]:
            total = total + term.diagonal(shape).to(total.device)
        return total

    def scaled(self, factor: float) -> Sum:
        """Return factor · C."""
        return Sum(tuple(term.scaled(factor) for term in self.terms))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Sum:
        """Return the same map on `device` in `dtype`."""
        return Sum(tuple(term.to(device, dtype) for term in self.terms))


def sketch_pays(size: int, rank: int) -> bool:
    """Tell whether products with F Fᵀ + diag(d), F ``[size, rank]``, take fewer operations than with the matrix."""
    return 2 * rank < size


def as_factor(curvature: Gram | LowRank) -> Tensor | LowRank:
    """Return what acts from the right as a factor of a Kronecker product: a matrix, or a sketch where that pays."""
    if isinstance(curvature, LowRank) and sketch_pays(*curvature.factor.shape[-2:]):
        return curvature
    return curvature.matrix if isinstance(curvature, Gram) else written_out(curvature)


def written_out(matrix: Tensor | LowRank) -> Tensor:
    """Return a matrix that may be a sketch as a tensor ``[…, d, d]``."""
    return matrix if isinstance(matrix, Tensor) else matrix.dense().matrix


def _from_left(matrix: Tensor | LowRank, value: Tensor) -> Tensor:
    """Return matrix · value, for a matrix that may be a sketch."""
    if isinstance(matrix, Tensor):
        return matrix @ value
    return (matrix.factor @ (matrix.factor.mT @ value)).addcmul_(value, matrix.rest.unsqueeze(-1))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == b.dim() == 2:
        return total.addmm_(a, b)
    return total.baddbmm_(a, b) if a.dim() == b.dim() == 3 else total.add_(a @ b)


def diagonal_of(matrix: Tensor | LowRank) -> Tensor:
    """Return the diagonal ``[…, d]`` of a matrix that may be a sketch."""
    if isinstance(matrix, Tensor):
        return matrix.diagonal(dim1=-2, dim2=-1)
    return matrix.factor.square().sum(-1) + matrix.rest


def stack(curvatures: Sequence[Curvature], like: Tensor) -> Curvature | None:
    """Return the map of several weights, each shaped as `like` is, stacked along a new first dimension.

    None where they are not all multiples of the identity, all Grams, all Kronecker products or all diagonals of one shape.
    """
    kind = type(curvatures[0])
    if any(type(curvature) is not kind for curvature in curvatures):
        return None
    if kind is Identity:
        scales = [curvature.scale for curvature in curvatures if isinstance(curvature, Identity)]
        return Identity(torch.tensor(scales).to(like).reshape(-1, *(1 for _ in like.shape)))
    if kind not in (Gram, Kronecker, Diagonal):
        return None
    columns = [[getattr(curvature, f.name) for curvature in curvatures] for f in fields(kind)]  # type: ignore[arg-type]
    stacks = [_stack_of(column) for column in columns]
    return None if any(held is None for held in stacks) else kind(*stacks)  # type: ignore[arg-type]


def _stack_of(column: list[Tensor | LowRank]) -> Tensor | LowRank | None:
    """Return tensors, or sketches, of one shape along a new first dimension; None where their shapes differ."""
    tensors = [held for held in column if isinstance(held, Tensor)]
    sketches = [held for held in column if isinstance(held, LowRank)]
    if not sketches:
        return torch.stack(tensors) if len({held.shape for held in tensors}) == 1 else None
    if tensors or len({held.factor.shape for held in sketches}) > 1:
        return None
    return LowRank(torch.stack([held.factor for held in sketches]), torch.stack([held.rest for held in sketches]))


def restrict(curvature: Curvature, basis: Tensor) -> Curvature:
    """Return the map Y ↦ Qᵀ C(Q Y) on coordinates Y ``[k, in]`` of weights Q Y, with Q ``[out, k]`` orthonormal.

    Raises:
        TypeError: a curvature that is not closed under it.

    """
    match curvature:
        case Identity() | Gram() | LowRank():
            return curvature
        case Kronecker():
            return Kronecker(basis.mT @ _from_left(curvature.output, basis), curvature.input)
        case Sum():
            return Sum(tuple(restrict(term, basis) for term in curvature.terms))
    raise TypeError(f"a {type(curvature).__name__} curvature does not restrict to a span of columns")


def _terms(curvature: Curvature) -> tuple[Curvature, ...]:
    return curvature.terms if isinstance(curvature, Sum) else (curvature,)


def _closed_sum(a: Curvature, b: Curvature) -> Curvature | None:
    """Return a + b where the sum is again of a simple kind, else None."""
    match (a, b):
        case (Identity(), Identity()):
            return Identity(a.scale + b.scale)
        case (Diagonal(), Diagonal()):
            return Diagonal(a.values + b.values)
        case (Gram(), Gram()):
            return Gram(a.matrix + b.matrix)
        case (Dense(), Dense()):
            return Dense(a.matrix + b.matrix)
        case (LowRank(), LowRank()):
            return LowRank(torch.cat([a.factor, b.factor], -1), a.rest + b.rest)
        case (LowRank(), Identity()):
            return LowRank(a.factor, a.rest + b.scale)
        case (LowRank(), Gram()):
            return Gram(a.dense().matrix + b.matrix)
        case (Diagonal(), Identity()):
            return Diagonal(a.values + b.scale)
        case (Gram() | Dense(), Identity()):
            return type(a)(
                a.matrix + b.scale * torch.eye(a.matrix.shape[-1], dtype=a.matrix.dtype, device=a.matrix.device)
            )
        case (Identity(), Diagonal() | Gram() | Dense() | LowRank()) | (Gram(), LowRank()):
            return _closed_sum(b, a)
    return None


def _nonnegative(factor: float) -> float:
    if not factor >= 0:
        raise ValueError(f"a curvature can only be scaled by a number that is not negative, not by {factor}")
    return factor
