"""The plan of a merge: what will happen to every tensor, and what it will cost."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import torch

from mats_hub.adapter import FoldedAdapter
from mats_hub.architecture import layer_pattern
from mats_hub.checkpoint import Checkpoint
from mats_hub.errors import MatsError, PlanError, ResourceError
from mats_hub.expert import Expert
from mats_hub.recipe import Recipe
from mats_hub.source import Source
from mats_hub.statistics.file import Statistics
from mats_hub.streaming import AHEAD, CHUNK_BYTES
from mats_hub.tensor_header import TensorHeader
from mats_hub.threads import workers

OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LINEAR_INITIALIZATIONS = ("average", "task_arithmetic")
"""Initializations that commute with products from both sides."""

SPECTRAL_INITIALIZATIONS = ("tsvm", "iso_c", "iso_cts", "knots")
"""Initializations that decompose matrices."""

MATRIX_KINDS = ("gram", "kfac", "task_vector")
"""The kinds of curvature that act on ``[out, in]`` matrices; the others act on a tensor as it is stored."""

PART_ENTRIES = 2**19
"""How many entries are merged at a time where that is done entry by entry: what fits a processor's cache."""

SMALL_BYTES = 2**27
"""A tensor whose merge takes less memory is merged beside others, on a thread of its own."""

INTERPRETER_BYTES = 450 * 10**6
"""What Python, torch and transformers take before a weight is read."""


class Action(StrEnum):
    """What happens to one tensor."""

    SOLVE = "solve"
    INITIALIZE = "initialize"
    COPY = "copy"
    KEEP = "keep per task"
    TIED = "tied"


@dataclass(frozen=True)
class Entry:
    """What happens to one tensor of the reference.

    Attributes:
        key: the reference's name for it.
        action: what happens.
        reason: why, in words.
        header: its dtype, shape and file in the reference.
        parameters: for a solved tensor, its name in each expert's statistics.
        turned: whether it is stored ``[in, out]``.
        transposed: the same where that matters to the curvature: whether a curvature made of Grams acts on its transpose.
        stacked: whether it stacks the matrices of several experts.
        on_inputs: whether a Gram acts on its inputs alone (not so for an embedding that is the head, too).
        origin: its name in the base's weights, where they are read; task vectors start from it.

    """

    key: str
    action: Action
    reason: str
    header: TensorHeader
    parameters: tuple[str, ...] = ()
    turned: bool = False
    transposed: bool = False
    stacked: bool = False
    on_inputs: bool = True
    origin: str | None = None


@dataclass
class Plan:
    """A merge as it will be done.

    Attributes:
        recipe: the recipe, with method ``auto`` resolved, the base named and sources pinned to commits.
        base: the base's checkpoint, or None when task vectors are taken from the experts' mean. For a merge into an adapter
            its config and the outline of what can be changed: the weights, or (IA)³ vectors.
        base_weights: the base's weights, where any are read.
        experts: the experts, aligned to the reference.
        statistics: each expert's statistics, or None.
        statistics_at: expert → the repository, at its commit, that its statistics are in, when that is another one.
        entries: one per tensor of the reference, in file order.
        kept: expert's name → its own tensors that go into its task's head.
        companions: where tokenizer, processor and generation config come from: the first that has some.
        problems: everything that stands in the way; the merge is refused unless it is empty.
        notes: what a careful reader would want to know.
        streamed: whether weights that are not on this machine are read by range and never stored.

    """

    recipe: Recipe
    base: Checkpoint | None = None
    base_weights: Checkpoint | None = None
    experts: list[Expert] = field(default_factory=list)
    statistics: list[Statistics | None] = field(default_factory=list)
    statistics_at: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    companions: list[Source] = field(default_factory=list)
    problems: list[MatsError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    streamed: bool = False

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint whose names, order, shapes and dtypes the merged model has: the base, else the first expert."""
        return self.base or self.experts[0].checkpoint

    @property
    def written(self) -> dict[str, TensorHeader]:
        """The merged checkpoint's tensors."""
        wanted = OUTPUT_DTYPES.get(self.recipe.output.dtype)
        layout = {}
        for entry in self.entries:
            if entry.action is Action.TIED or (entry.action is Action.KEEP and self.base is None):
                continue
            cast = wanted is not None and entry.header.is_float
            layout[entry.key] = replace(entry.header, dtype=wanted) if cast and wanted else entry.header
        return layout

    @property
    def merged_entries(self) -> list[Entry]:
        """The tensors that are merged."""
        return [entry for entry in self.entries if entry.action in (Action.SOLVE, Action.INITIALIZE)]

    @cached_property
    def is_double(self) -> bool:
        """Whether a model is stored in float64, so that everything is computed in it."""
        return any(header.dtype == "F64" for held in self.checkpoints for header in held.headers.values())

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes that the merge downloads: weight files that are not on this machine yet; streamed, once for each reading."""
        return sum(missing_bytes(source) for source in self._sources) * (self.readings if self.streamed else 1)

    @property
    def readings(self) -> int:
        """How often every task vector is read."""
        return 1 if self.recipe.initialization.global_density is None else 3

    @property
    def _sources(self) -> list[Source]:
        return [checkpoint.source for checkpoint in self.checkpoints]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The experts' weights, and the base's where any are read."""
        return [*(expert.checkpoint for expert in self.experts), *([self.base_weights] if self.base_weights else [])]

    @property
    def identity(self) -> list[object]:
        """What tells whether the inputs are still the ones they were: commits, or the files' sizes and times."""
        paths = [
            source.folder / name
            for source in self._sources
            if source.folder is not None
            for name in source.weight_files
        ]
        paths += [file for statistics in self.statistics if statistics for file in statistics.files]
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return [[source.public_spec for source in self._sources], facts]

    def finish_reading(self) -> None:
        """End one reading of all weights: what was streamed is checked against the Hub's hashes.

        Raises:
            WrongBytes: a file has other bytes than the Hub says.

        """
        for checkpoint in self.checkpoints:
            checkpoint.finish()

    @property
    def disk_bytes(self) -> int:
        """Bytes of the merged weights and the heads kept per task."""
        heads = 0
        for expert in self.experts:
            for own in self.kept.get(expert.name, ()):
                heads += expert.checkpoint.headers[expert.whole[own]].nbytes
        if self.recipe.output.format == "adapter":
            return heads + sum(
                expert.source.sizes[name] for expert in self.experts for name in expert.source.weight_files
            )
        return sum(header.nbytes for header in self.written.values()) + heads

    @property
    def peak_memory_bytes(self) -> int:
        """An upper estimate of the memory the merge needs: the interpreter, and the costliest tensor with its statistics."""
        held = [self.working_bytes(entry) for entry in self.entries]
        working = max((size * (workers(torch.device("cpu")) if size <= SMALL_BYTES else 1) for size in held), default=0)
        if self.base and any(isinstance(expert.adapter, FoldedAdapter) for expert in self.experts):
            working = max(
                working, 6 * sum(header.numel for header in self.base.headers.values())
            )  # PEFT holds the base
        streams = sum(any(map(source.is_streamed, source.weight_files)) for source in self._sources)
        return INTERPRETER_BYTES + working + streams * (AHEAD + 1) * CHUNK_BYTES

    def shortages(self, output: Path, share: float = 1.0) -> list[ResourceError]:
        """Return what this machine has too little of for the merge.

        Args:
            output: where it is written; what has to be fetched goes into the Hub's cache.
            share: of what is free, that the merge may take.

        """
        import psutil
        from huggingface_hub import constants

        found = []
        free = share * psutil.virtual_memory().available
        if self.peak_memory_bytes > free:
            found.append(
                ResourceError(
                    f"the merge needs about {human_bytes(self.peak_memory_bytes)} of memory, but {human_bytes(free)} are free. "
                    "Measure statistics as sketches (--rank), merge into an adapter (--format adapter), or use a larger machine"
                )
            )
        wanted: dict[Path, int] = {}
        stored = 0 if self.streamed else self.bytes_to_fetch
        for folder, size in ((output, self.disk_bytes), (Path(constants.HF_HUB_CACHE), stored)):
            there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
            disk = next((known for known in wanted if known.stat().st_dev == there.stat().st_dev), there)
            wanted[disk] = wanted.get(disk, 0) + size
        for folder, size in wanted.items():
            free = share * shutil.disk_usage(folder).free
            if size > free:
                found.append(
                    ResourceError(
                        f"the merge needs {human_bytes(size)} of disk under {str(folder)!r}, but {human_bytes(free)} are free. "
                        "Make room, write elsewhere (--output), put the Hub's cache on another disk (HF_HOME), or keep no "
                        "expert on this machine (--stream)"
                    )
                )
        return found

    @property
    def entry_by_entry(self) -> bool:
        """Whether the initialization of an entry depends on the experts' values of this entry alone (and on thresholds)."""
        start = self.recipe.initialization
        if start.method == "ties":
            return start.global_density is not None
        return start.method in ("average", "task_arithmetic", "dare", "dare_ties", "consensus")

    def in_factors(self, entry: Entry) -> bool:
        """Tell whether a weight of a merge into a LoRA adapter is merged in the experts' factors, and not as a dense matrix.

        A linear initialization commutes with products from both sides; a curvature has to act from the right alone, or to
        be restricted to the span of the factors.
        """
        if self.recipe.output.format != "adapter" or self.recipe.initialization.method not in LINEAR_INITIALIZATIONS:
            return False
        if not entry.on_inputs:
            return False
        kind = self.recipe.curvature.kind if entry.action is Action.SOLVE and self.recipe.curvature else None
        within = self.recipe.solver is not None and self.recipe.solver.subspace == "factors"
        return kind in (None, "gram", "task_vector") or (kind == "kfac" and within)

    def working_bytes(self, entry: Entry) -> int:
        """Return about how much memory the merge of a tensor takes: its task vectors, statistics, result, and what solves."""
        n, count, width = entry.header.numel, len(self.experts), 8 if self.is_double else 4
        if entry.action not in (Action.SOLVE, Action.INITIALIZE):
            return 2 * entry.header.nbytes if self.recipe.output.format == "full" else 0
        in_factors, solved = self.in_factors(entry), entry.action is Action.SOLVE
        if self.recipe.initialization.method in SPECTRAL_INITIALIZATIONS and len(entry.header.shape) > 1:
            n = 2 * n  # singular vectors of as many entries as the task vectors have
        if in_factors:  # in float64: the factors, what is stacked of them, their bases and the result
            held = [(expert, expert.names[entry.key]) for expert in self.experts if expert.holds(entry.key)]
            tensors = 48 * sum(e.checkpoint.headers[name].numel for e, own in held for name in e.files(own))
        elif not solved and self.entry_by_entry and not any(expert.adapter for expert in self.experts):
            tensors = width * min(n, PART_ENTRIES * workers(torch.device("cpu"))) * (3 * count + 4)
        else:
            tensors = width * n * (3 * count + 4 + (8 if solved else 0))
        if not solved or self.recipe.curvature is None or self.recipe.solver is None:
            return tensors
        kind = self.recipe.curvature.kind
        if kind == "fisher":
            return tensors + width * n * (count + 2)
        if kind in ("gram", "kfac"):
            measured = zip(self.statistics, entry.parameters, strict=False)
            known = [(s, name) for s, name in measured if s]
            squares = max((s.entries(name, kind) for s, name in known), default=0)
            kept = max((s.entries(name, kind, dense=False) for s, name in known), default=0)
        else:
            size = n if kind == "block_fisher" else max(entry.header.shape[-2:])
            squares = kept = 0 if in_factors and kind == "task_vector" else size * size
        if self.recipe.solver.method == "exact":
            return tensors + (width * (count + 2) + 32) * squares
        joined = min(squares, count * kept)  # what the experts' sum holds, which a preconditioner factorizes in float64
        factorized = 32 * joined if self.recipe.solver.preconditioner == "kronecker" else 0
        return tensors + width * (kept * count + 2 * joined) + factorized

    def has_rows(self, key: str) -> bool:
        """Tell whether only some rows of a tensor are merged, because the experts' vocabularies differ."""
        return any(key in expert.rows for expert in self.experts)

    def work(self, entry: Entry) -> float:
        """Return about how many operations a tensor takes, to share tensors out among processes."""
        n, count = entry.header.numel, len(self.experts) + 1
        if entry.action is not Action.SOLVE or self.recipe.solver is None or len(entry.header.shape) < 2:
            return float(n * count)
        steps = self.recipe.solver.iterations if self.recipe.solver.method == "cg" else 1
        return float(n * count * (4 + steps * sum(entry.header.shape[-2:])))

    def counts(self) -> dict[str, int]:
        """Return how many tensors each action is for."""
        found = Counter(str(entry.action) for entry in self.entries)
        return {str(action): found[str(action)] for action in Action if found[str(action)]}

    def raise_problems(self) -> None:
        """Raise `PlanError` with every problem, if there is one."""
        if self.problems:
            raise PlanError(self.problems)

    def __str__(self) -> str:
        lines = [f"method: {self.recipe.method}"]
        if self.base:
            lines.append(f"base: {self.base.source.public_spec}")
        lines += [f"expert {e.name}: {e.source.public_spec}, {e.kind}, weight {e.weight:g}" for e in self.experts]
        if self.entries:
            lines += ["", *_grouped(self.entries), ""]
            lines.append(", ".join(f"{action}: {count} tensors" for action, count in self.counts().items()))
        lines += [f"kept for {name}: {', '.join(own)}" for name, own in self.kept.items() if own]
        if self.entries:
            fetch = f"to stream, in {self.readings} readings" if self.streamed else "to fetch"
            lines.append(
                f"{fetch}: {human_bytes(self.bytes_to_fetch)}; memory: about {human_bytes(self.peak_memory_bytes)}; "
                f"disk: {human_bytes(self.disk_bytes)}"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {type(problem).__name__}: {problem}" for problem in self.problems]
        if not self.problems:
            lines.append("nothing stands in the way of this merge")
        return "\n".join(lines)


def _grouped(entries: list[Entry]) -> list[str]:
    """Return one line for each kind of tensor: layers that share name, shape and fate stand together."""
    groups = Counter(
        (layer_pattern(e.key), "×".join(map(str, e.header.shape)), str(e.action), e.reason) for e in entries
    )
    width = max(len(pattern) for pattern, *_ in groups)
    return [
        f"  {pattern:{width}}  {f'{count}×' if count > 1 else '':4} [{shape}]  {action}: {reason}"
        for (pattern, shape, action, reason), count in groups.items()
    ]


def missing_bytes(source: Source) -> int:
    """Return the bytes of a source's weight files that are not on this machine."""
    if source.folder is not None:
        return 0
    return sum(source.sizes[name] for name in source.weight_files if not source.is_cached(name))


def human_bytes(count: float) -> str:
    """Return a number of bytes in words: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
