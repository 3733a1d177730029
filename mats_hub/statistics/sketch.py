"""Sketches of Grams: a low-rank factor and the diagonal that it leaves out, measured in one pass without a d × d matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sketch:
    """How Grams are sketched: G Ω is summed instead of G, with Ω ``[d, rank]`` (Nyström; Gittens & Mahoney 2016).

    Attributes:
        rank: columns of Ω; more where there are more directions.
        directions: module → rows ``[r, d]`` that Ω spans, so that their products with G are exact (an adapter's A).
        seed: of the other columns, which are random.

    """

    rank: int
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0

    def probes(self, modules: Sequence[str], width: int) -> Tensor:
        """Return Ω, orthonormal, for the input of `width` features that these modules share."""
        rows = [self.directions[module].float() for module in modules if module in self.directions]
        wanted = min(max(self.rank, sum(len(block) for block in rows)), width)
        digest = hashlib.sha256(f"{self.seed}\0{modules[0]}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        drawn = torch.randn(width, wanted, generator=generator)
        columns = torch.cat([*(block.T for block in rows), drawn], 1)[:, : max(wanted, 1)]
        return torch.linalg.qr(columns.double())[0].float().contiguous()


def nystrom(product: Tensor, probes: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return (F ``[d, q]``, rest ``[d]``) with G ≈ F Fᵀ + diag(rest), of the same diagonal as G.

    F Fᵀ = (G Ω)(Ωᵀ G Ω)⁺(G Ω)ᵀ is the part of G that Ω sees; F Fᵀ Ω = G Ω.

    Args:
        product: G Ω ``[d, rank]``.
        probes: Ω ``[d, rank]``.
        diagonal: of G, ``[d]``.

    """
    wide, omega = product.double().cpu(), probes.double().cpu()
    core = omega.T @ wide
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    keep = values > len(values) * torch.finfo(torch.float32).eps * values[-1].clamp(min=0)
    factor = wide @ (vectors[:, keep] / values[keep].sqrt())
    rest = (diagonal.double().cpu() - factor.square().sum(1)).clamp(min=0)
    return factor.float(), rest.float()
