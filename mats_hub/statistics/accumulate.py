"""Sums that statistics are made of: never means, so that parts of the data add up exactly."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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

    def split_experts(self, parts: Mapping[str, tuple[str, int, slice]]) -> None:
        """Give the matrices of stacked experts sums of their own, under the names they have in a checkpoint.

        Args:
            parts: name in a checkpoint → the stacked parameter, which of its experts, and which rows of it.

        """
        for other, (parameter, index, rows) in parts.items():
            if parameter not in self.uses:
                continue
            module, first = other.removesuffix(".weight"), f"{parameter}.{index}"
            self.uses[other], self.tokens[module] = [("linear", module)], self.tokens[parameter]
            if f"{first}.input_gram" not in self.tensors:
                self.tensors[f"{first}.input_gram"] = self.tensors[f"{parameter}.input_gram"][index].clone()
            self.aliases[module] = first
            if f"{parameter}.output_gram" in self.tensors:
                whole = self.tensors[f"{parameter}.output_gram"][index]
                self.tensors[f"{module}.output_gram"] = whole[rows, rows].clone()
        for parameter in dict.fromkeys(name for name, _, _ in parts.values()):
            if self.uses.pop(parameter, None):
                self.tokens.pop(parameter)
                self.tensors.pop(f"{parameter}.input_gram")
                self.tensors.pop(f"{parameter}.output_gram", None)

    def join_rows(self, joined: Mapping[str, Sequence[tuple[str, int, int]]]) -> None:
        """Give weights and biases whose rows a checkpoint puts together the sums of what it stores.

        The weights must have read the same inputs, and be sums without a sketch. Between rows of different modules the Gram of
        output gradients is taken as zero.

        Args:
            joined: as `mats_hub.architecture.Architecture.joined`.

        """
        gone: set[str] = set()
        for name, runs in joined.items():
            sources = list(dict.fromkeys(source for source, *_ in runs))
            squares = [self.tensors.get(f"{source}.fisher") for source in sources]
            if all(held is not None for held in squares):
                parts = [self.tensors[f"{source}.fisher"][start:stop] for source, start, stop in runs]
                self.tensors[f"{name}.fisher"] = torch.cat(parts)
                for source in sources:
                    del self.tensors[f"{source}.fisher"]
            uses = [self.uses.get(source, []) for source in sources]
            modules = {source: held[0][1] for source, held in zip(sources, uses, strict=True) if len(held) == 1}
            leaders = {self.aliases.get(module, module) for module in modules.values()}
            kinds = {kind for held in uses for kind, _ in held}
            if len(modules) < len(sources) or len(leaders) > 1 or kinds not in ({"linear"}, {"bias"}):
                continue
            if any(f"{module}.output_factor" in self.tensors for module in modules.values()):
                continue
            module = name.rpartition(".")[0]
            self.uses[name] = [(kinds.pop(), module)]
            self.tokens[module], self.aliases[module] = self.tokens[modules[sources[0]]], leaders.pop()
            self._join_outputs(module, [(modules[source], start, stop) for source, start, stop in runs])
            gone |= set(sources)
        left = {module for source in gone for _, module in self.uses.pop(source)}
        for module in left - {module for held in self.uses.values() for _, module in held}:
            self.tokens.pop(module)
            self.tensors.pop(f"{module}.output_gram", None)

    def _join_outputs(self, joined: str, runs: Sequence[tuple[str, int, int]]) -> None:
        """Put together the Gram of output gradients of rows of several modules."""
        if not all(f"{module}.output_gram" in self.tensors for module, *_ in runs):
            return
        sizes = [stop - start for _, start, stop in runs]
        blocks = [[torch.zeros(height, width) for width in sizes] for height in sizes]
        for row, (module, *rows) in enumerate(runs):
            for column, (other, *columns) in enumerate(runs):
                if module == other:
                    blocks[row][column] = self.tensors[f"{module}.output_gram"][slice(*rows), slice(*columns)]
        self.tensors[f"{joined}.output_gram"] = torch.cat([torch.cat(held, 1) for held in blocks])

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


def is_symmetric(key: str) -> bool:
    """Tell whether the sum of this name is a symmetric matrix, or a stack of them."""
    return key.endswith((".input_gram", ".output_gram", ".block_fisher"))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
