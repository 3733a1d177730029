"""The statistics file: sums and counts in safetensors, with where they come from; and curvatures made from them."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import KeysView
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.architecture import layer_pattern
from mats_hub.curvature import Curvature, Dense, Diagonal, Gram, Kronecker, LowRank
from mats_hub.errors import CheckpointError, StatisticsError, StatisticsMismatch
from mats_hub.recipe import Curvature as CurvatureOptions
from mats_hub.source import TensorHeader, give_usual_mode, read_header
from mats_hub.statistics.accumulate import Sums

STATISTICS_FILE = "statistics.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "mats_statistics"
STATISTICS_ACCURACY = torch.finfo(torch.float32).eps
"""Relative rounding error of the stored sums."""


@dataclass(frozen=True)
class Provenance:
    """Where statistics come from; written into the file and into cards, so it never holds a local path.

    Attributes:
        kinds: gram, kfac, fisher.
        model: the expert, ``owner/name@commit`` or a folder's last part.
        fingerprint: sha256 over the expert's weight files.
        task: text-classification, causal-lm, seq2seq, image-classification.
        dataset: Hub id or a file's name; with its config, split and commit where they exist.
        columns: role → column of the data set.
        examples: how many examples were seen, shuffled with `seed` when they are not all.
        tokens: how many unmasked rows the widest-seen module saw.
        label_source: ``data`` (empirical Fisher), ``model`` (true Fisher), or none for Grams alone.
        max_length: tokens after which a text was cut, when it was.
        dtype: the dtype the model ran in.
        sketch_rank: columns of the sketches, where input Grams are sketched.
        dropped: the largest share of a Gram's trace of which its sketch keeps only the diagonal.
        transposed: modules that store their weight ``[in, out]``.
        library_version: the version of this package.

    """

    kinds: tuple[str, ...]
    model: str = ""
    fingerprint: str = ""
    task: str = ""
    dataset: str = ""
    dataset_config: str | None = None
    dataset_split: str | None = None
    dataset_commit: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    label_source: str = "data"
    max_length: int | None = None
    seed: int = 0
    dtype: str = "float32"
    sketch_rank: int | None = None
    dropped: float = 0.0
    transposed: tuple[str, ...] = ()
    library_version: str = ""
    format_version: int = FORMAT_VERSION


class Statistics:
    """Statistics of one expert, in memory or in a file read tensor by tensor.

    Attributes:
        provenance: where they come from.
        tokens: module → the number of rows its Grams sum over.
        aliases: module → the module that stores the input Gram for both.

    """

    def __init__(self, provenance: Provenance, sums: Sums, path: Path | None = None) -> None:
        self.provenance, self._sums, self.path = provenance, sums, path
        self.tokens, self.aliases = sums.tokens, sums.aliases
        self._headers: dict[str, TensorHeader] = {}

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Open a statistics file; tensors are read when they are used.

        Raises:
            StatisticsError: it is not a statistics file, or of a newer format.
            CheckpointError: it is cut short.

        """
        path = Path(path)
        if not path.is_file():
            raise StatisticsError(f"there is no statistics file {str(path)!r}; measure one with 'mats-hub statistics'")
        headers, metadata = read_header(path, str(path.parent.name or path.name))
        try:
            content = json.loads(metadata[METADATA_KEY])
            version = int(content["provenance"]["format_version"])
            if version > FORMAT_VERSION:
                raise StatisticsError(
                    f"{path.name!r} has statistics of format {version}; this version reads up to {FORMAT_VERSION}. "
                    "Update mats-hub"
                )
            known = {f.name for f in fields(Provenance)}
            given = {key: value for key, value in content["provenance"].items() if key in known}
            provenance = Provenance(
                **{**given, "kinds": tuple(given["kinds"]), "transposed": tuple(given["transposed"])}
            )
            tokens = {str(key): int(value) for key, value in content["tokens"].items()}
            aliases = {str(key): str(value) for key, value in content["aliases"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise StatisticsError(
                f"{path.name!r} is a safetensors file but holds no statistics of this package"
            ) from None
        statistics = cls(provenance, Sums({}, tokens, aliases, provenance.examples), path)
        statistics._headers = headers
        return statistics

    def save(self, path: str | Path) -> Path:
        """Write the file; it appears complete or not at all. Returns its path.

        Of symmetric matrices the upper triangle is stored, row by row.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"provenance": asdict(self.provenance), "tokens": self.tokens, "aliases": self.aliases}
        tensors = {key: self.tensor(key).cpu() for key in self.keys()}
        tensors = {key: packed(t) if _is_symmetric(key) else t.contiguous() for key, t in tensors.items()}
        partial = path.with_name(f".{path.name}.partial")
        # One entry of metadata alone: safetensors writes several in random order.
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(content)})
        give_usual_mode(partial)
        os.replace(partial, path)
        self.path = path
        return path

    def keys(self) -> KeysView[str]:
        """Return the names of the stored sums."""
        return (self._headers or self._sums.tensors).keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a stored sum."""
        if not self._headers:
            return tuple(self._sums.tensors[key].shape)
        shape = self._headers[key].shape
        return (_side(shape[0]),) * 2 if _is_symmetric(key) and len(shape) == 1 else shape

    def tensor(self, key: str) -> Tensor:
        """Return a stored sum."""
        if not self._headers:
            return self._sums.tensors[key]
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                stored = file.get_tensor(key)
                if stored.dim() != 1 or not _is_symmetric(key):
                    return stored
                if _side(len(stored)) * (_side(len(stored)) + 1) != 2 * len(stored):
                    raise CheckpointError(
                        f"statistics {self.provenance.model!r}: {key!r} holds no triangle of a matrix"
                    )
                return unpacked(stored)
        except SafetensorError as error:
            raise CheckpointError(f"statistics {self.provenance.model!r} cannot be read: {error}") from None

    def __str__(self) -> str:
        found = self.provenance
        of = f" at {found.dataset_commit[:12]}" if found.dataset_commit else ""
        lines = [
            f"{', '.join(found.kinds)} statistics of {found.model} (weights {found.fingerprint[:12]})",
            f"data: {found.dataset}{of}, {found.dataset_split or 'the whole file'}; task {found.task}; {found.examples} "
            f"examples, {found.tokens} tokens; labels: {found.label_source}",
            f"measured in {found.dtype} by mats_hub {found.library_version}, seed {found.seed}",
        ]
        if found.sketch_rank:
            lines.append(
                f"sketched, rank {found.sketch_rank}: the diagonal alone of up to {found.dropped:.0%} of a Gram"
            )
        groups = Counter((layer_pattern(key), "×".join(map(str, self.shape(key)))) for key in self.keys())
        lines += [
            f"  {pattern}  {f'{count}×' if count > 1 else ''} [{shape}]" for (pattern, shape), count in groups.items()
        ]
        shared = f", {len(self.aliases)} modules share another's input Gram" if self.aliases else ""
        return "\n".join([*lines, f"{len(self.keys())} sums{shared}"])

    def covers(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Return the parameters that a curvature of this kind exists for → the shape it acts on, ``[out, in]``.

        A block Fisher acts on a vector of d entries in any shape; for it ``[d, d]`` is given.
        """
        if kind in ("fisher", "block_fisher"):
            ending = f".{kind}"
            return {key.removesuffix(ending): self.shape(key) for key in self.keys() if key.endswith(ending)}
        found: dict[str, tuple[int, ...]] = {}
        for module in self.tokens:
            source = self.aliases.get(module, module)
            whole, sketch = f"{source}.input_gram", f"{source}.input_factor"
            inner = sketch if sketch in self.keys() else whole
            outer = f"{module}.output_gram"
            if kind == "gram" and inner in self.keys():
                found[f"{module}.weight"] = (0, self.shape(inner)[0])
            elif inner in self.keys() and outer in self.keys():
                found[f"{module}.weight"] = (self.shape(outer)[0], self.shape(inner)[0])
        return found

    def is_transposed(self, parameter: str) -> bool:
        """Tell whether the module stores this weight ``[in, out]``."""
        return parameter.removesuffix(".weight") in self.provenance.transposed

    def check_expert(self, name: str, fingerprint: str, public_spec: str) -> None:
        """Refuse statistics of other weights than the expert's.

        Raises:
            StatisticsMismatch: they were measured on another commit or model.

        """
        mine = self.provenance.fingerprint
        if mine and mine != fingerprint:
            raise StatisticsMismatch(
                f"expert {name!r} is {public_spec} (weights {fingerprint[:12]}), but its statistics were measured on "
                f"{self.provenance.model} (weights {mine[:12]}). Pin the expert to that commit, or measure again with "
                f"'mats-hub statistics {public_spec} --kind {self.provenance.kinds[0]}'"
            )

    def curvature(
        self,
        parameter: str,
        options: CurvatureOptions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Curvature:
        """Return the curvature of one parameter: the mean over tokens (Grams) or examples (Fisher) of the stored sums.

        Args:
            parameter: the parameter's name in the measured model.
            options: kind, off-diagonal scale, floor and normalization, as the recipe has them.
            device: where to put it.
            dtype: what to compute in.

        """
        if options.kind == "block_fisher":
            block = self.tensor(f"{parameter}.block_fisher").to(device, dtype) / max(self.provenance.examples, 1)
            return Dense(_normalized(_off_diagonal(block, options.off_diagonal), options.normalization))
        if options.kind == "fisher":
            values = self.tensor(f"{parameter}.fisher").to(device, dtype) / max(self.provenance.examples, 1)
            return _normalized_diagonal(values.clamp(min=options.floor), options.normalization)
        module = parameter.removesuffix(".weight")
        count = max(self.tokens[module], 1)
        source = self.aliases.get(module, module)
        if f"{source}.input_factor" in self.keys():
            parts = (self.tensor(f"{source}.input_{part}").to(device, dtype) for part in ("factor", "rest"))
            return _conditioned_sketch(LowRank(*parts).scaled(1 / count), options)
        inner = conditioned_gram(self.tensor(f"{source}.input_gram").to(device, dtype) / count, options)
        if options.kind == "gram":
            return inner
        outer = conditioned_gram(self.tensor(f"{module}.output_gram").to(device, dtype) / count, options)
        return Kronecker(outer.matrix, inner.matrix)


def packed(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix ``[n, n]``, row by row: ``[n (n + 1) / 2]``."""
    return matrix[torch.ones(matrix.shape, dtype=torch.bool).triu()]


def unpacked(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix ``[n, n]`` of an upper triangle ``[n (n + 1) / 2]``."""
    side = _side(len(triangle))
    matrix = torch.zeros(side, side, dtype=triangle.dtype)
    matrix[torch.ones(side, side, dtype=torch.bool).triu()] = triangle
    return matrix + matrix.triu(1).T


def _side(entries: int) -> int:
    return (math.isqrt(8 * entries + 1) - 1) // 2


def _is_symmetric(key: str) -> bool:
    return key.endswith((".input_gram", ".output_gram", ".block_fisher"))


def conditioned_gram(matrix: Tensor, options: CurvatureOptions) -> Gram:
    """Return the curvature of a Gram ``[d, d]`` with the recipe's off-diagonal factor and normalization."""
    return Gram(_normalized(_off_diagonal(matrix, options.off_diagonal), options.normalization))


def _conditioned_sketch(curvature: LowRank, options: CurvatureOptions) -> LowRank:
    """Return a sketched Gram with the recipe's off-diagonal factor and normalization, as `conditioned_gram` does."""
    seen = curvature.factor.square().sum(1)
    rest = curvature.rest + (1 - options.off_diagonal) * seen
    changed = LowRank(curvature.factor * options.off_diagonal**0.5, rest)
    seen = changed.factor.square().sum(1)
    gram = changed.factor.T @ changed.factor
    frobenius = float(gram.square().sum() + 2 * (seen * rest).sum() + rest.square().sum()) ** 0.5
    size = {"none": 1.0, "trace": float((seen + rest).mean()), "frobenius": frobenius}[options.normalization]
    return changed.scaled(1 / size) if size > 0 else changed


def _off_diagonal(matrix: Tensor, factor: float) -> Tensor:
    return matrix if factor == 1 else matrix * factor + torch.diag(matrix.diagonal() * (1 - factor))


def _normalized(matrix: Tensor, how: str) -> Tensor:
    size = {"none": 1.0, "trace": float(matrix.trace()) / len(matrix), "frobenius": float(matrix.norm())}[how]
    return matrix / size if size > 0 else matrix


def _normalized_diagonal(values: Tensor, how: str) -> Diagonal:
    size = {"none": 1.0, "trace": float(values.mean()), "frobenius": float(values.norm())}[how]
    return Diagonal(values / size if size > 0 else values)
