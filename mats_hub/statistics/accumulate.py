"""Sums that statistics are made of: never means, so that parts of the data add up exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sums:
    """Sums over a task's data.

    Attributes:
        tensors: ``{module}.input_gram`` Σ x xᵀ ``[in, in]``, ``{module}.output_gram`` Σ g gᵀ ``[out, out]`` (float32),
            ``{parameter}.fisher`` Σ (∂ loss of one example / ∂ parameter)² in the parameter's shape.
        tokens: ``{module}`` → the number of unmasked input rows its Grams sum over.
        aliases: module → the module that reads the same input and stores the input Gram for both.
        examples: how many examples were seen.

    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    examples: int = 0

    def add_rows(self, key: str, rows: Tensor) -> None:
        """Add Σ r rᵀ over the rows of a ``[n, d]`` tensor to the Gram ``[d, d]`` under `key`."""
        rows = rows.detach().to(torch.float32)
        self.add(key, rows.T @ rows)

    def add(self, key: str, value: Tensor) -> None:
        """Add a tensor to the sum under `key`."""
        if key in self.tensors:
            self.tensors[key] += value
        else:
            self.tensors[key] = value.detach().clone()

    def merged(self, other: Sums) -> Sums:
        """Return the sums over both parts of the data."""
        if self.aliases != other.aliases or self.tensors.keys() != other.tensors.keys():
            raise ValueError("these sums are of different modules or kinds and cannot be added")
        tensors = {key: value + other.tensors[key] for key, value in self.tensors.items()}
        return Sums(tensors, _added(self.tokens, other.tokens), dict(self.aliases), self.examples + other.examples)


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
