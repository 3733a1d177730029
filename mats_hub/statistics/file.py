"""The statistics file: sums and counts in safetensors, with where they come from; and curvatures made from them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.architecture import layer_pattern
from mats_hub.checkpoint import TORCH_DTYPES
from mats_hub.curvature import (
    Curvature,
    Dense,
    Gram,
    Identity,
    Kronecker,
    LowRank,
    as_factor,
    sketch_pays,
    written_out,
)
from mats_hub.errors import CheckpointError, RecipeError, StatisticsError, StatisticsMismatch, unknown
from mats_hub.recipe import PARAMETERS
from mats_hub.recipe import Curvature as CurvatureOptions
from mats_hub.statistics.accumulate import Sums, is_symmetric
from mats_hub.statistics.conditioning import (
    conditioned_block,
    conditioned_gram,
    conditioned_sketch,
    normalized_diagonal,
)
from mats_hub.statistics.storage import (
    INDEX_ENDING,
    SCALE,
    STORAGE,
    Fetch,
    decode,
    encode,
    encoded_headers,
    read,
    side,
    write,
)
from mats_hub.tensor_header import TensorHeader

STATISTICS_FILE = "statistics.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "mats_statistics"
VECTOR_SUMS = {"gram": "input_squares", "kfac": "gradient_squares"}
"""Of a vector that scales features: kind of curvature → the sum it is made from."""

FLOAT32_EPS = torch.finfo(torch.float32).eps


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
        tokens: module → the number of rows its sums are over.
        aliases: module → the module that stores the input Gram for both.
        uses: parameter → what is done with it, in which modules.

    """

    def __init__(
        self, provenance: Provenance, sums: Sums, path: Path | None = None, fetch: Fetch | None = None
    ) -> None:
        self.provenance, self._sums, self.path = provenance, sums, path
        self.tokens, self.aliases = sums.tokens, sums.aliases
        self.uses = sums.uses or {f"{module}.weight": [("linear", module)] for module in self.tokens}
        self._headers: dict[str, TensorHeader] = {}
        self._fetch: Fetch = fetch or (lambda name: Path(path or ".").with_name(name))

    @classmethod
    def load(cls, path: str | Path, fetch: Fetch | None = None) -> Statistics:
        """Open a statistics file, or several by their index; tensors are read when they are used.

        Args:
            path: the file, or the index; where only the index is there, the file's name finds it, too.
            fetch: name of a file beside it → where it is; files beside it otherwise.

        Raises:
            StatisticsError: it is not a statistics file, or of a newer format.
            CheckpointError: it is cut short.

        """
        path = Path(path)
        index = path.with_name(path.name + INDEX_ENDING)
        path = index if index.is_file() and not path.is_file() else path
        if not path.is_file():
            raise StatisticsError(f"there is no statistics file {str(path)!r}; measure one with 'mats-hub statistics'")
        headers, metadata = read(path, fetch or path.with_name)
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
            listed = content.get("uses", {}).items()
            uses = {str(key): [(str(kind), str(module)) for kind, module in found] for key, found in listed}
            if not {module for found in uses.values() for _, module in found} <= tokens.keys():
                raise ValueError("a module whose rows were not counted")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise StatisticsError(
                f"{path.name!r} is a safetensors file but holds no statistics of this package"
            ) from None
        statistics = cls(provenance, Sums({}, tokens, aliases, provenance.examples, uses=uses), path, fetch)
        statistics._headers = headers
        return statistics

    def save(self, path: str | Path, storage: str = "float32", max_shard_bytes: float = 5e9) -> Path:
        """Write the file, or several and an index where it would be larger than a shard may be; return its path.

        Args:
            path: where to.
            storage: dtype of matrices: float32, float16 or bfloat16 (see `mats_hub.statistics.storage.encode`).
            max_shard_bytes: the largest file.

        Raises:
            RecipeError: the dtype is not known.

        """
        if storage not in STORAGE:
            raise RecipeError(unknown("dtype to store statistics in", storage, STORAGE))
        content = {
            "provenance": asdict(self.provenance),
            "tokens": self.tokens,
            "aliases": self.aliases,
            "uses": self.uses,
        }
        dtype = STORAGE[storage]
        headers: dict[str, TensorHeader] = {}
        for key in sorted(self.keys()):
            headers |= encoded_headers(key, self.shape(key), dtype)

        def tensor(name: str) -> Tensor:
            key = name if name in self.keys() else name.removesuffix(SCALE)
            return encode(key, self.tensor(key), dtype)[name]

        metadata = {METADATA_KEY: json.dumps(content, sort_keys=True)}
        self.path = write(headers, tensor, Path(path), metadata, max_shard_bytes)
        return self.path

    @property
    def files(self) -> list[Path]:
        """The files it is in, the index among them."""
        if self.path is None:
            return []
        names = dict.fromkeys(header.file for header in self._headers.values())
        return list(dict.fromkeys([self.path, *(self._fetch(name) for name in names)]))

    @property
    def accuracy(self) -> float:
        """Relative rounding error of the stored sums."""
        stored = {TORCH_DTYPES[header.dtype] for header in self._headers.values()}
        return max((torch.finfo(dtype).eps for dtype in stored if dtype.is_floating_point), default=FLOAT32_EPS)

    def keys(self) -> Collection[str]:
        """Return the names of the stored sums."""
        return self._names if self._headers else self._sums.tensors.keys()

    @cached_property
    def _names(self) -> dict[str, TensorHeader]:
        return {key: header for key, header in self._headers.items() if not key.endswith(SCALE)}

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a stored sum."""
        if not self._headers:
            return tuple(self._sums.tensors[key].shape)
        shape = self._headers[key].shape
        return (*shape[:-1], *(side(shape[-1]),) * 2) if self._is_packed(key, len(shape)) else shape

    def tensor(self, key: str) -> Tensor:
        """Return a stored sum, in float32."""
        if not self._headers:
            return self._sums.tensors[key]
        stored, scale = self._stored(key), self._stored(key + SCALE) if key + SCALE in self._headers else None
        try:
            return decode(key, stored, scale, self._is_packed(key, stored.dim()))
        except (CheckpointError, RuntimeError) as error:
            raise CheckpointError(f"statistics {self.provenance.model!r}: {key!r} cannot be read: {error}") from None

    def _stored(self, key: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._fetch(self._headers[key].file), framework="pt") as file:
                return file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"statistics {self.provenance.model!r} cannot be read: {error}") from None

    def _is_packed(self, key: str, dimensions: int) -> bool:
        """Tell whether a stored tensor holds the triangle of a symmetric matrix, or of a stack of them."""
        return is_symmetric(key) and dimensions == (2 if key.rpartition(".")[0] in self._stacked else 1)

    @cached_property
    def _stacked(self) -> set[str]:
        """The modules whose sums are stacks of matrices."""
        return {module for found in self.uses.values() for use, module in found if use == "experts"}

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

    def covers(self, kind: str, parameters: Collection[str] = PARAMETERS) -> dict[str, tuple[int, ...]]:
        """Return the parameters that a curvature of this kind exists for → the shape it acts on, ``[out, in]``; 0 is any size.

        A block Fisher acts on a vector of d entries in any shape; for it ``[d, d]`` is given.

        Args:
            kind: of curvature.
            parameters: with ``gram`` and ``kfac``, the kinds of parameters that are wanted.

        """
        if kind in ("fisher", "block_fisher"):
            ending = f".{kind}"
            return {key.removesuffix(ending): self.shape(key) for key in self.keys() if key.endswith(ending)}
        if kind == "kfac" and kind not in self.provenance.kinds:
            return {}
        found = {}
        for parameter, uses in self.uses.items():
            acting = (self._acts_on(kind, parameter, use, module) for use, module in uses if use in parameters)
            shapes = [shape for shape in acting if shape is not None]
            if len(shapes) == len(uses):
                if len(shapes) > 1:  # an embedding that is the head, too, acts as it is stored
                    shapes = [s[::-1] if use == "embedding" else s for (use, _), s in zip(uses, shapes, strict=True)]
                found[parameter] = tuple(map(max, zip(*shapes, strict=True)))
        return found

    def _acts_on(self, kind: str, parameter: str, use: str, module: str) -> tuple[int, ...] | None:
        """Return the shape that the curvature of one use of a parameter acts on, or None where there is none."""
        keys = self.keys()
        if use == "embedding":
            counts = f"{module}.input_counts"
            return (0, *self.shape(counts)) if counts in keys else None
        if use == "norm":
            squares = f"{parameter}.{VECTOR_SUMS[kind]}"
            return self.shape(squares) if squares in keys else None
        outer = self._sum_of(module, "output") if kind == "kfac" else None
        if use == "bias":
            squares = f"{parameter}.gradient_squares"
            return self.shape(outer or squares)[:1] if outer or (kind == "kfac" and squares in keys) else (0,)
        inner = self._sum_of(self.aliases.get(module, module), "input")
        if inner is None:
            return None
        stack = self.shape(inner)[:1] if use == "experts" else ()
        return (*stack, self.shape(outer)[len(stack)] if outer else 0, self.shape(inner)[len(stack)])

    def _sum_of(self, module: str, side: str) -> str | None:
        """Return the name of a module's Gram of inputs or of output gradients, or of the factor of its sketch."""
        names = (f"{module}.{side}_gram", f"{module}.{side}_factor")
        return next((name for name in names if name in self.keys()), None)

    def entries(self, parameter: str, kind: str, dense: bool = True) -> int:
        """Return how many numbers the curvature of a parameter holds; `dense`: with its sketches written out."""
        found = 0
        for use, module in self.uses.get(parameter, ()) if kind in VECTOR_SUMS else ():
            outer = self._sum_of(module, "output") if kind == "kfac" else None
            if use in ("embedding", "norm") or (use == "bias" and not outer):
                found += max(self._acts_on(kind, parameter, use, module) or (0,))
            elif use == "bias" and outer:
                found += self.shape(outer)[0] ** 2
            else:
                inner = self._sum_of(self.aliases.get(module, module), "input")
                for name in filter(None, (inner, outer)):
                    *stack, size, rank = self.shape(name)
                    sketched = name.endswith("_factor") and not dense and (outer is None or sketch_pays(size, rank))
                    found += math.prod(stack) * size * (rank + 1 if sketched else size)
        return found

    def is_transposed(self, parameter: str) -> bool:
        """Tell whether a curvature acts on the transpose of this weight as it is stored, ``[in, out]``.

        An embedding is a linear map of one-hot inputs, stored that way; where it is the head, too, it acts as it is stored.
        """
        uses = [use for use, _ in self.uses.get(parameter, ())]
        return uses == ["embedding"] or parameter.removesuffix(".weight") in self.provenance.transposed

    def acts_on_inputs(self, parameter: str) -> bool:
        """Tell whether a Gram of this weight acts on its inputs alone, and not, as of an embedding that is the head, on both."""
        return len(self.uses.get(parameter, ())) < 2

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
            return conditioned_block(block, options)
        if options.kind == "fisher":
            values = self.tensor(f"{parameter}.fisher").to(device, dtype) / max(self.provenance.examples, 1)
            return normalized_diagonal(values.clamp(min=options.floor), options.normalization)
        uses = self.uses[parameter]
        parts = (self._of_use(use, module, parameter, options, device, dtype, len(uses) > 1) for use, module in uses)
        return reduce(add, parts)

    def _of_use(
        self,
        use: str,
        module: str,
        parameter: str,
        options: CurvatureOptions,
        device: torch.device | str,
        dtype: torch.dtype,
        shared: bool,
    ) -> Curvature:
        """Return the curvature of one use of a parameter; of an embedding that is `shared` with the head by its rows."""
        count = max(self.tokens[module], 1)

        def mean(key: str) -> Tensor:
            return self.tensor(key).to(device, dtype) / count

        if use == "embedding":
            counts = mean(f"{module}.input_counts")
            if shared:
                return normalized_diagonal(counts[:, None], options.normalization)
            return conditioned_sketch(LowRank(counts.new_zeros(len(counts), 0), counts), options)
        if use == "norm":
            return normalized_diagonal(mean(f"{parameter}.{VECTOR_SUMS[options.kind]}"), options.normalization)
        outer = self._sum_of(module, "output") if options.kind == "kfac" else None
        squares = f"{parameter}.gradient_squares"
        if use == "bias" and outer is None:  # of a constant input
            of_gradients = options.kind == "kfac" and squares in self.keys()
            return normalized_diagonal(mean(squares), options.normalization) if of_gradients else Identity()

        def gram(name: str) -> Gram | LowRank:
            if name.endswith("_gram"):
                return conditioned_gram(mean(name), options)
            rest = mean(f"{name.removesuffix('factor')}rest")
            return conditioned_sketch(LowRank(mean(name) * count**0.5, rest), options)

        outputs = gram(outer) if outer else None
        if use == "bias":
            assert outputs is not None
            return Dense(written_out(as_factor(outputs)))
        inner = self._sum_of(self.aliases.get(module, module), "input")
        assert inner is not None
        inputs = gram(inner)
        return inputs if outputs is None else Kronecker(as_factor(outputs), as_factor(inputs))
