"""LoRA adapters: low-rank changes of weights, of stacks of experts, and of what a checkpoint makes of several weights."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from mats_hub.adapter import Adapter, at_least_float32
from mats_hub.architecture import Architecture, Piece, align
from mats_hub.checkpoint import Checkpoint
from mats_hub.delta import LowRankDelta
from mats_hub.errors import CheckpointError
from mats_hub.tensor_header import TensorHeader


@dataclass(frozen=True)
class Factors:
    """Where one weight's factors are and how they make its change.

    Attributes:
        B: name of the left factor in the file.
        A: name of the right factor in the file.
        scale: factor of the product.
        shape: the weight's shape, as it is stored.
        transposed: whether the weight is stored ``[in, out]``.
        form: ``linear`` (of a linear module), ``parameter`` (of a matrix named by target_parameters), ``embedding``,
            ``convolution``, or ``stacked`` (of one parameter that holds the matrices of several experts: their factors are
            stacked, in A and in B each in its own way, as in PEFT's ``ParamWrapper``).

    """

    B: str
    A: str
    scale: float
    shape: tuple[int, ...]
    transposed: bool = False
    form: str = "linear"

    @property
    def count(self) -> int:
        """How many experts' factors are stacked."""
        return self.shape[0] if self.form == "stacked" else 1


class LoraAdapter(Adapter):
    """A LoRA adapter: low-rank deltas of some weights (Hu et al. 2022, https://arxiv.org/abs/2106.09685).

    Attributes:
        factors: weight name in the model → its factors.
        pieces: tensor that a checkpoint makes of the rows of weights it has factors for → those rows, as `Architecture.pieces`;
            what they are of is in `sources` then, and no longer in `factors`.
        sources: weight of such rows → its factors.

    Raises:
        CheckpointError: a tensor that is not known, or factors that do not belong together.

    """

    title = "LoRA"

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        super().__init__(checkpoint, options)
        self.factors: dict[str, Factors] = {}
        self.pieces: dict[str, Sequence[Piece]] = {}
        self.sources: dict[str, Factors] = {}
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        for name in checkpoint.headers:
            module = name.removeprefix("base_model.model.")
            found = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", module)
            if found:
                pairs.setdefault((found[1], bool(found[2])), {})[found[3]] = name
            elif "lora_" in module or "trainable_tokens" in module or not module.endswith((".weight", ".bias")):
                raise self._unknown(name)
            else:
                self._save(module, name)
        self._perhaps_bare: dict[str, list[dict[str, str]]] = {}
        self._read: tuple[Any, Any, Any] = (None, None, None)
        for (path, embedding), pair in pairs.items():
            module = path.replace(".base_layer", "")
            if set(pair) != {"A", "B"}:
                raise CheckpointError(
                    f"{checkpoint.source.spec!r}: module {module!r} has only LoRA factor {'/'.join(pair)}; fetch it again"
                )
            if not embedding and self._targets(module):
                self._perhaps_bare.setdefault(module, []).append(pair)
            else:
                self.factors[f"{module}.weight"] = self._of_module(module, embedding, pair)
        for name in self.factors:  # beside factors of an embedding PEFT saves the base's own weight, unchanged
            self.saved.pop(name, None)
        for held in self._perhaps_bare.values():
            # PEFT wraps a module once for each parameter: the first one's factors lie the deepest.
            held.sort(key=lambda pair: -pair["A"].count(".base_layer"))

    @property
    def changed(self) -> Collection[str]:
        """The weights it has factors for; those that `target_parameters` may name once `settle` has told which they are."""
        return ChainMap[str, Any](self.factors, self.pieces)

    @property
    def description(self) -> str:
        """What it is, with the largest rank of its factors."""
        return f"LoRA adapter (rank {max((self.rank(name) for name in self.changed), default=0)})"

    def rank(self, own: str) -> int:
        """Return the rank of one weight's delta."""
        return sum(
            self.checkpoint.headers[factors.A].shape[0] // factors.count for factors, _ in self._all_factors(own)
        )

    def shape(self, own: str) -> tuple[int, ...]:
        """Return the shape of a weight it changes, as it is stored."""
        if own in self.factors:
            return self.factors[own].shape
        return sum(piece.stop - piece.start for piece in self.pieces[own]), self._all_factors(own)[0][0].shape[-1]

    def files(self, own: str) -> tuple[str, ...]:
        """Return the names of one weight's factors in the file."""
        return tuple(name for factors, _ in self._all_factors(own) for name in (factors.B, factors.A))

    def delta(self, own: str) -> LowRankDelta:
        """Return scale · B A of one weight."""
        if own in self.factors:
            return self._product(self.factors[own])
        held = self._all_factors(own)
        products = [self._product(factors) for factors, _ in held]
        matrices = [
            (p.B[index], p.A[index]) if p.A.dim() > 2 else (p.B, p.A)
            for p, (_, index) in zip(products, held, strict=True)
        ]
        A = torch.cat([at_least_float32(right) for _, right in matrices])
        B, row = A.new_zeros(self.shape(own)[0], len(A)), 0
        columns = [0, *accumulate(len(right) for _, right in matrices)]
        for piece in self.pieces[own]:
            size, source = piece.stop - piece.start, self.sources.get(piece.parameter)
            if source is not None:
                at = held.index((source, piece.matrix))
                part = at_least_float32(matrices[at][0][piece.start : piece.stop])
                B[row : row + size, columns[at] : columns[at + 1]] = products[at].scale * part
            row += size
        return LowRankDelta(B, A, 1.0)

    def _all_factors(self, own: str) -> list[tuple[Factors, int]]:
        """Return the factors that make one weight's delta, each once, and which matrix's they are of a stack."""
        if own in self.factors:
            return [(self.factors[own], 0)]
        found = ((self.sources.get(piece.parameter), piece.matrix) for piece in self.pieces[own])
        return list(dict.fromkeys((factors, index) for factors, index in found if factors is not None))

    def _product(self, factors: Factors) -> LowRankDelta:
        names, B, A = self._read
        if names != (factors.B, factors.A):
            B, A = self.checkpoint.tensor(factors.B), self.checkpoint.tensor(factors.A)
            self._read = (factors.B, factors.A), B, A  # the next may be another expert's in the same tensors
        if factors.form == "stacked":
            A = A.reshape(factors.count, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, factors.count).permute(2, 0, 1)
        if factors.form == "convolution":
            return LowRankDelta(B.flatten(1), A.flatten(1), factors.scale, weight_shape=factors.shape)
        return LowRankDelta(B, A, factors.scale, factors.transposed)

    def settle(self, facts: Architecture, headers: Mapping[str, TensorHeader]) -> None:
        """Name bare parameters in their module's order, and turn the weights that the base stores ``[in, out]``.

        PEFT writes one `fan_in_fan_out` for all modules, the last one's.
        """
        for module, held in self._perhaps_bare.items():
            self.factors |= self._of_parameters(module, held, facts)
        mapping = align(self.factors, headers, facts.stored_names)
        transposed = set(align(facts.transposed, headers, facts.stored_names).values())
        for name, target in mapping.items():
            factors, turned = self.factors[name], target in transposed
            if facts.linear and factors.form == "linear" and factors.transposed != turned:
                self.factors[name] = replace(factors, transposed=turned, shape=factors.shape[::-1])

    def as_stored(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        """Tell the changes of weights whose rows a checkpoint stores otherwise as changes of what it stores.

        Args:
            pieces: of `Architecture.pieces`, those of the checkpoint.

        """
        known = [n for n, held in self.factors.items() if held.form in ("linear", "stacked") and not held.transposed]
        own_names = align(known, {piece.parameter for made in pieces.values() for piece in made})
        self.sources = {source: self.factors.pop(own) for own, source in own_names.items()}
        for own in own_names:
            self._perhaps_bare.pop(own.rpartition(".")[0], None)
        self.pieces = {
            name: made for name, made in pieces.items() if any(piece.parameter in self.sources for piece in made)
        }

    def _of_parameters(self, module: str, held: list[dict[str, str]], facts: Architecture) -> dict[str, Factors]:
        """Return the factors of a module's parameters that target_parameters names, or of the module.

        A target without its module, as PEFT writes them for all linear modules of a mixture of experts, is an ending of any
        module's parameters: which are there the base tells.
        """
        wanted = self._targets(module)
        known = {
            name.rpartition(".")[2]: stack
            for name, stack in facts.stacked.items()
            if f".{module}".endswith(f".{name.rpartition('.')[0]}") or name.rpartition(".")[0].endswith(f".{module}")
        }
        leaves = [leaf for leaf in known if leaf in wanted]
        if len(leaves) == len(held):
            named = zip(leaves, held, strict=True)
            return {f"{module}.{leaf}": self._stack(pair, f"{module}.{leaf}", *known[leaf]) for leaf, pair in named}
        own, alone = f"{module}.weight", len(held) == 1 and not leaves
        if alone and "weight" in wanted:
            return {own: self._matrix(held[0], own, "parameter")}
        if alone and set(wanted) <= set(self.options["target_parameters"]):
            return {own: self._of_module(module, False, held[0])}
        raise CheckpointError(
            f"{self.checkpoint.source.spec!r} changes {module}.{wanted[0]} (target_parameters), which is no weight of "
            "experts that this version of transformers knows in its base. Merge it into its base with PEFT's "
            "merge_and_unload() and use the full checkpoint"
        )

    def _targets(self, module: str) -> list[str]:
        """Return the parameters of a module that `target_parameters` names."""
        targets = self.options.get("target_parameters") or ()
        named = [(target, target.rpartition(".")[2]) for target in targets]
        return sorted({leaf for target, leaf in named if f".{module}.{leaf}".endswith(f".{target}")})

    def _of_module(self, module: str, embedding: bool, pair: Mapping[str, str]) -> Factors:
        a, b = (self.checkpoint.headers[pair[factor]].shape for factor in "AB")
        if len(a) > 2 and len(b) == len(a) and a[0] == b[1] and set(b[2:]) == {1}:
            scale = self._scale(module, a[0])
            return Factors(pair["B"], pair["A"], scale, (b[0], *a[1:]), form="convolution")
        factors = self._matrix(pair, module, "embedding" if embedding else "linear")
        if embedding or self.options.get("fan_in_fan_out"):
            return replace(factors, transposed=True, shape=factors.shape[::-1])
        return factors

    def _matrix(self, pair: Mapping[str, str], name: str, form: str) -> Factors:
        a, b = (self.checkpoint.headers[pair[factor]].shape for factor in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise self._no_product(name, a, b)
        return Factors(pair["B"], pair["A"], self._scale(name, a[0]), (b[0], a[1]), form=form)

    def _stack(self, pair: Mapping[str, str], name: str, count: int, transposed: bool) -> Factors:
        a, b = (self.checkpoint.headers[pair[factor]].shape for factor in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % count:
            raise self._no_product(name, a, b)
        matrix = (a[1], b[0]) if transposed else (b[0], a[1])
        scale = self._scale(name, a[0] // count)
        return Factors(pair["B"], pair["A"], scale, (count, *matrix), transposed, "stacked")

    def _no_product(self, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.source.spec!r}: {name!r} has LoRA factors of shapes B {b} and A {a}, which are no matrix "
            "product. Merge it into its base with PEFT's merge_and_unload() and use the full checkpoint"
        )

    def _scale(self, name: str, rank: int) -> float:
        """Return alpha / r, or alpha / √r for rsLoRA, with PEFT's rule for patterns of names."""
        alpha = self.options.get("lora_alpha") or 8
        for pattern, value in (self.options.get("alpha_pattern") or {}).items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error:
                found = None
            if found and isinstance(value, int | float):
                alpha = value
                break
        return float(alpha) / (rank**0.5 if self.options.get("use_rslora") else rank)
