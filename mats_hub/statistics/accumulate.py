"""Sums that statistics are made of: never means, so that parts of the data add up exactly."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mats_hub.architecture import Piece
from mats_hub.statistics.sketch import nystrom


@dataclass
class Sums:
    """Sums over a task's data.

    Attributes:
        tensors: ``{module}.input_gram`` Σ x xᵀ ``[in, in]``, ``{module}.output_gram`` Σ g gᵀ ``[out, out]`` (float32),
            or of a sketch with probes Ω ``{module}.input_product`` Σ x (xᵀ Ω) ``[in, q]`` and ``{module}.input_diagonal``
            Σ x² ``[in]``, and the same of outputs,
            ``{module}.input_counts`` how often each row of an embedding was looked up ``[vocab]``,
            ``{parameter}.input_squares`` and ``{parameter}.gradient_squares`` Σ over tokens of the square of what a vector
            scales, and of its gradient from one token ``[d]``,
            ``{parameter}.fisher`` Σ (∂ loss of one example / ∂ parameter)² in the parameter's shape,
            ``{parameter}.block_fisher`` Σ g gᵀ ``[d, d]`` of that gradient, for a vector of d entries.
            Of experts stored in one parameter the Grams are stacked, ``[experts, d, d]``.
        tokens: ``{module}`` → the number of unmasked input rows its sums are over.
        uses: parameter → what is done with it: pairs of a kind (`recipe.PARAMETERS`) and the module whose sums tell of it.
        aliases: module → the module that reads the same input and stores the input Gram for both.
        examples: how many examples were seen.
        probes: ``{module}.input`` or ``{module}.output`` → Ω ``[d, q]``, where that Gram is sketched.
        per_token: embedding → whether it is looked up once for each token.
        token_axis: vectors that scale ``[batch, …, …, features]`` → the axis of tokens.

    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    examples: int = 0
    probes: dict[str, Tensor] = field(default_factory=dict)
    uses: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    per_token: dict[str, bool] = field(default_factory=dict)
    token_axis: dict[str, int] = field(default_factory=dict)

    def use(self, parameter: str, kind: str, module: str) -> None:
        """Note what is done with a parameter."""
        held = self.uses.setdefault(parameter, [])
        if (kind, module) not in held:
            held.append((kind, module))

    def add_inputs(self, module: str, rows: Tensor) -> None:
        """Add the rows ``[n, in]`` that a module reads to its input Gram, or to the sketch of it."""
        self._add_side(module, "input", rows)

    def add_outputs(self, module: str, rows: Tensor) -> None:
        """Add the rows ``[n, out]`` of the gradient of a module's output to its output Gram, or to the sketch of it."""
        self._add_side(module, "output", rows)

    def _add_side(self, module: str, side: str, rows: Tensor) -> None:
        probes = self.probes.get(f"{module}.{side}")
        if probes is None:
            return self.add_rows(f"{module}.{side}_gram", rows)
        rows = rows.detach().to(torch.float32)
        self.add(f"{module}.{side}_product", rows.T @ (rows @ probes.to(rows.device)))
        self.add(f"{module}.{side}_diagonal", rows.square().sum(0))

    def add_rows(self, key: str, rows: Tensor, index: int | None = None, count: int = 0) -> None:
        """Add Σ r rᵀ over the rows of a ``[n, d]`` tensor to the Gram ``[d, d]`` under `key`, or to one of `count` stacked."""
        rows = rows.detach().to(torch.float32)
        gram = rows.T @ rows
        if index is None:
            return self.add(key, gram)
        if key not in self.tensors:
            self.tensors[key] = _wide(gram.new_zeros(count, *gram.shape))
        self._held(key, gram.device)[index] += gram

    def add(self, key: str, value: Tensor) -> None:
        """Add a tensor to the sum under `key`, which is held in float64 where the device has it (see `statistics.parallel`)."""
        if key in self.tensors:
            self._held(key, value.device).add_(value)
        else:
            self.tensors[key] = _wide(value.detach().clone())

    def _held(self, key: str, device: torch.device) -> Tensor:
        """Return a sum, moved to where it is added to: one that was recorded comes back on the CPU."""
        self.tensors[key] = self.tensors[key].to(device)
        return self.tensors[key]

    def merged(self, other: Sums) -> Sums:
        """Return the sums over both parts of the data."""
        if self.aliases != other.aliases or self.tensors.keys() != other.tensors.keys():
            raise ValueError("these sums are of different modules or kinds and cannot be added")
        tensors = {key: value + other.tensors[key] for key, value in self.tensors.items()}
        tokens = _added(self.tokens, other.tokens)
        examples = self.examples + other.examples
        return Sums(tensors, tokens, dict(self.aliases), examples, dict(self.probes), dict(self.uses))

    def joined(self, other: Sums) -> Sums:
        """Return these sums and those of other parameters over the same data."""
        found = {
            name: {**getattr(self, name), **value} for name, value in vars(other).items() if isinstance(value, dict)
        }
        if not isinstance(other.tensors, dict):  # on disk, where they stay
            found["tensors"] = ChainMap(other.tensors, self.tensors)
        return Sums(**found, examples=other.examples)

    def narrow(self) -> None:
        """End the summation: every sum in float32 and on the CPU, as it is stored, and matrices symmetric to the last digit."""
        for key in list(self.tensors):  # one after the other, so that memory holds no second copy of all
            value = self.tensors[key].float().cpu()
            self.tensors[key] = value.triu().add_(value.triu(1).mT) if is_symmetric(key) else value

    def as_stored(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        """Give what a checkpoint stores otherwise than the model has it sums of its own, under the names it has there.

        Weights whose rows are put together must have read the same inputs, and be sums without a sketch. Between rows of
        different modules the Gram of output gradients is taken as zero.

        Args:
            pieces: `mats_hub.architecture.Architecture.pieces`.

        """
        new = Sums()
        gone: set[str] = set()
        gone_squares: set[str] = set()
        for name, made in pieces.items():
            squares = [self.tensors.get(f"{piece.parameter}.fisher") for piece in made]
            parts = [
                (held[index] if held.dim() > 2 else held)[start:stop]
                for held, (_, index, start, stop) in zip(squares, made, strict=True)
                if held is not None
            ]
            if len(parts) == len(made):
                new.tensors[f"{name}.fisher"] = torch.cat(parts)
                gone_squares |= {piece.parameter for piece in made}
            uses = {piece.parameter: self.uses.get(piece.parameter, []) for piece in made}
            kinds = {kind for held in uses.values() for kind, _ in held}
            modules = {parameter: held[0][1] for parameter, held in uses.items() if len(held) == 1}
            if len(modules) < len(uses) or kinds not in ({"linear"}, {"bias"}, {"experts"}):
                continue
            stacked = kinds == {"experts"}
            leaders = {self._leader(modules[piece.parameter], piece.matrix, stacked) for piece in made}
            if len(leaders) > 1 or any(f"{module}.output_factor" in self.tensors for module in modules.values()):
                continue
            module = name.rpartition(".")[0]
            new.uses[name] = [("bias" if kinds == {"bias"} else "linear", module)]
            new.tokens[module], new.aliases[module] = self.tokens[modules[made[0].parameter]], leaders.pop()
            grams = [self.tensors.get(f"{modules[piece.parameter]}.output_gram") for piece in made]
            whole = [
                gram[piece.matrix] if stacked else gram
                for gram, piece in zip(grams, made, strict=True)
                if gram is not None
            ]
            if len(whole) == len(made):
                new.tensors[f"{module}.output_gram"] = _blocks(made, whole)
            gone |= uses.keys()
        self._remove(gone, gone_squares)
        for name, held in vars(new).items():
            if held:
                getattr(self, name).update(held)

    def _remove(self, parameters: Collection[str], squares: Collection[str]) -> None:
        """Remove the sums of parameters, and the squared gradients of others."""
        for parameter in squares:
            del self.tensors[f"{parameter}.fisher"]
        removed = [use for parameter in parameters for use in self.uses.pop(parameter)]
        left = {module for uses in self.uses.values() for _, module in uses}
        for kind, module in dict.fromkeys(removed):
            if module not in left:
                self.tokens.pop(module, None)
                self.tensors.pop(f"{module}.output_gram", None)
                if kind == "experts":
                    self.tensors.pop(f"{module}.input_gram")

    def _leader(self, module: str, index: int, stacked: bool) -> str:
        """Return what stores the input Gram of a module, or of one of the experts in it, whose own is stored by that."""
        if not stacked:
            return self.aliases.get(module, module)
        leader = f"{module}.{index}"
        if f"{leader}.input_gram" not in self.tensors:
            self.tensors[f"{leader}.input_gram"] = self.tensors[f"{module}.input_gram"][index].clone()
        return leader

    def finish_sketches(self) -> float:
        """Replace each sketch's sums by ``{module}.input_factor`` F ``[d, q]`` and ``{module}.input_rest`` ``[d]`` (or output).

        Returns:
            The largest share of a Gram's trace that F Fᵀ leaves to the rest.

        """
        dropped = 0.0
        for side, probes in self.probes.items():
            if f"{side}_product" not in self.tensors:
                continue
            product = self.tensors.pop(f"{side}_product")
            diagonal = self.tensors.pop(f"{side}_diagonal")
            factor, rest = nystrom(product, probes, diagonal)
            self.tensors |= {f"{side}_factor": factor, f"{side}_rest": rest}
            dropped = max(dropped, float(rest.sum() / diagonal.sum().clamp(min=torch.finfo(torch.float32).tiny)))
        self.probes = {}
        return dropped


def _blocks(made: Sequence[Piece], grams: Sequence[Tensor]) -> Tensor:
    """Return the Gram of rows of several outputs, from the Gram of each output; zero between different ones."""
    rows = [
        [
            gram[row.start : row.stop, column.start : column.stop]
            if row[:2] == column[:2]
            else gram.new_zeros(row.stop - row.start, column.stop - column.start)
            for column in made
        ]
        for row, gram in zip(made, grams, strict=True)
    ]
    return torch.cat([torch.cat(held, 1) for held in rows])


def is_symmetric(key: str) -> bool:
    """Tell whether the sum of this name is a symmetric matrix, or a stack of them."""
    return key.endswith((".input_gram", ".output_gram", ".block_fisher"))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
