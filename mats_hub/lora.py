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
from mats_hub.architecture import Architecture, align
from mats_hub.checkpoint import Checkpoint
from mats_hub.delta import LowRankDelta
from mats_hub.errors import CheckpointError


@dataclass(frozen=True)
class Factors:
    """Where one weight's factors are and how they make its change.

    Those of a parameter that holds the matrices of several experts stack the experts' factors, in A and in B each in its own way
    (PEFT's ``ParamWrapper``).

    Attributes:
        B: name of the left factor in the file.
        A: name of the right factor in the file.
        scale: factor of the product.
        shape: the weight's shape, as it is stored.
        transposed: whether the weight is stored ``[in, out]``.
        form: ``linear`` (of a linear module), ``parameter`` (of a matrix named by target_parameters), ``embedding``,
            ``convolution``, ``stacked`` (of one parameter that holds the matrices of several experts), or ``expert`` (of
            one of those matrices, or of some of its rows).
        count: how many experts' factors are stacked.
        index: of ``expert``, which of them.
        rows: of ``expert``, its first row and the one behind its last.

    """

    B: str
    A: str
    scale: float
    shape: tuple[int, ...]
    transposed: bool = False
    form: str = "linear"
    count: int = 1
    index: int = 0
    rows: tuple[int, int] = (0, 0)


class LoraAdapter(Adapter):
    """A LoRA adapter: low-rank deltas of some weights (Hu et al. 2022, https://arxiv.org/abs/2106.09685).

    Attributes:
        factors: weight name in the model → its factors.
        joined: tensor that a checkpoint makes of the rows of several weights → those rows, in order: the factors of their weight,
            None where the adapter does not change it, the first, and the one behind the last.

    Raises:
        CheckpointError: a tensor that is not known, or factors that do not belong together.

    """

    title = "LoRA"

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        super().__init__(checkpoint, options)
        self.factors: dict[str, Factors] = {}
        self.joined: dict[str, list[tuple[Factors | None, int, int]]] = {}
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
        return ChainMap[str, Any](self.factors, self.joined)

    @property
    def description(self) -> str:
        """What it is, with the largest rank of its factors."""
        return f"LoRA adapter (rank {max((self.rank(name) for name in self.changed), default=0)})"

    def rank(self, own: str) -> int:
        """Return the rank of one weight's delta."""
        return sum(self.checkpoint.headers[factors.A].shape[0] // factors.count for factors in self._all_factors(own))

    def shape(self, own: str) -> tuple[int, ...]:
        """Return the shape of a weight it changes, as it is stored."""
        if own in self.joined:
            rows = sum(stop - start for _, start, stop in self.joined[own])
            return rows, *self._all_factors(own)[0].shape[1:]
        return self.factors[own].shape

    def files(self, own: str) -> tuple[str, ...]:
        """Return the names of one weight's factors in the file."""
        return tuple(name for factors in self._all_factors(own) for name in (factors.B, factors.A))

    def delta(self, own: str) -> LowRankDelta:
        """Return scale · B A of one weight."""
        if own not in self.joined:
            return self._product(self.factors[own])
        products = {factors: self._product(factors) for factors in self._all_factors(own)}
        A = torch.cat([at_least_float32(product.A) for product in products.values()])
        B, row = A.new_zeros(self.shape(own)[0], len(A)), 0
        columns = dict(zip(products, accumulate((len(p.A) for p in products.values()), initial=0), strict=False))
        for factors, start, stop in self.joined[own]:
            if factors is not None:
                product, column = products[factors], columns[factors]
                part = product.scale * at_least_float32(product.B[start:stop])
                B[row : row + stop - start, column : column + len(product.A)] = part
            row += stop - start
        return LowRankDelta(B, A, 1.0)

    def _all_factors(self, own: str) -> list[Factors]:
        """Return the factors that make one weight's delta, each once."""
        if own not in self.joined:
            return [self.factors[own]]
        return list(dict.fromkeys(factors for factors, *_ in self.joined[own] if factors is not None))

    def _product(self, factors: Factors) -> LowRankDelta:
        names, B, A = self._read
        if names != (factors.B, factors.A):
            B, A = self.checkpoint.tensor(factors.B), self.checkpoint.tensor(factors.A)
            self._read = (factors.B, factors.A), B, A  # the next may be another expert's in the same tensors
        if factors.form in ("stacked", "expert"):
            A = A.reshape(factors.count, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, factors.count).permute(2, 0, 1)
        if factors.form == "expert":
            A, B = A[factors.index], B[factors.index, slice(*factors.rows)]
        if factors.form == "convolution":
            return LowRankDelta(B.flatten(1), A.flatten(1), factors.scale, weight_shape=factors.shape)
        return LowRankDelta(B, A, factors.scale, factors.transposed)

    def settle(self, facts: Architecture, reference: Checkpoint) -> None:
        """Name bare parameters in their module's order, and turn the weights that the base stores ``[in, out]``.

        PEFT writes one `fan_in_fan_out` for all modules, the last one's.
        """
        for module, held in self._perhaps_bare.items():
            self.factors |= self._of_parameters(module, held, facts)
        mapping = align(self.factors, reference.headers, facts.stored_names)
        transposed = set(align(facts.transposed, reference.headers, facts.stored_names).values())
        for name, target in mapping.items():
            factors, turned = self.factors[name], target in transposed
            if facts.linear and factors.form == "linear" and factors.transposed != turned:
                self.factors[name] = replace(factors, transposed=turned, shape=factors.shape[::-1])

    def split(self, parts: Mapping[str, tuple[str, int, slice]]) -> None:
        """Tell the changes of parameters that stack experts' matrices as changes of what a checkpoint stores them in.

        Args:
            parts: name in a checkpoint → the stacked parameter, which of its experts, and which rows of it.

        """
        stacks = [
            name for name, factors in self.factors.items() if factors.form == "stacked" and not factors.transposed
        ]
        own_names = {stack: own for own, stack in align(stacks, {stack for stack, *_ in parts.values()}).items()}
        for name, (stack, index, rows) in parts.items():
            if stack in own_names:
                whole, span = self.factors[own_names[stack]], (rows.start, rows.stop)
                shape = span[1] - span[0], whole.shape[2]
                self.factors[name] = replace(whole, shape=shape, form="expert", index=index, rows=span)
        for own in own_names.values():
            del self.factors[own]
            self._perhaps_bare.pop(own.rpartition(".")[0], None)

    def join(self, rows: Mapping[str, Sequence[tuple[str, int, int]]]) -> None:
        """Tell the changes of weights whose rows a checkpoint puts together as changes of what it stores.

        Args:
            rows: as `Architecture.joined`.

        """
        linear = [name for name, factors in self.factors.items() if factors.form == "linear" and not factors.transposed]
        own_names = align(linear, {source for runs in rows.values() for source, *_ in runs})
        sources = {source: self.factors[own] for own, source in own_names.items()}
        for name, runs in rows.items():
            if any(source in sources for source, *_ in runs):
                self.joined[name] = [(sources.get(source), start, stop) for source, start, stop in runs]
        for own in own_names:
            del self.factors[own]
            self._perhaps_bare.pop(own.rpartition(".")[0], None)

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
        return Factors(pair["B"], pair["A"], scale, (count, *matrix), transposed, "stacked", count)

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
