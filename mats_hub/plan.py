"""The plan of a merge: what will happen to every tensor, and what it will cost."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum

from mats_hub.checkpoint import Checkpoint
from mats_hub.errors import MatsError, PlanError
from mats_hub.expert import Expert
from mats_hub.recipe import Recipe
from mats_hub.source import Source, TensorHeader
from mats_hub.statistics.file import Statistics

OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
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

    """

    key: str
    action: Action
    reason: str
    header: TensorHeader
    parameters: tuple[str, ...] = ()


@dataclass
class Plan:
    """A merge as it will be done.

    Attributes:
        recipe: the recipe, with method ``auto`` resolved, the base named and sources pinned to commits.
        base: the base's checkpoint, or None when task vectors are taken from the experts' mean.
        experts: the experts, aligned to the reference.
        statistics: each expert's statistics, or None.
        entries: one per tensor of the reference, in file order.
        kept: expert's name → its own tensors that go into its task's head.
        problems: everything that stands in the way; the merge is refused unless it is empty.
        notes: what a careful reader would want to know.

    """

    recipe: Recipe
    base: Checkpoint | None = None
    experts: list[Expert] = field(default_factory=list)
    statistics: list[Statistics | None] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    problems: list[MatsError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
    def bytes_to_fetch(self) -> int:
        """Bytes that the merge downloads: weight files that are not on this machine yet."""
        sources = [expert.source for expert in self.experts]
        sources += [self.base.source] if self.base and self.recipe.output.format == "full" else []
        return sum(missing_bytes(source) for source in sources)

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
        return INTERPRETER_BYTES + max((self._working_bytes(entry) for entry in self.entries), default=0)

    def _working_bytes(self, entry: Entry) -> int:
        n, count = entry.header.numel, len(self.experts)
        if entry.action not in (Action.SOLVE, Action.INITIALIZE):
            return 2 * entry.header.nbytes
        tensors = 4 * n * (3 * count + 4)
        if entry.action is not Action.SOLVE or self.recipe.curvature is None or self.recipe.solver is None:
            return tensors
        tensors += 4 * n * 8
        if self.recipe.curvature.kind == "fisher":
            return tensors + 4 * n * (count + 2)
        squares = [size * size for size in (entry.header.shape[-2:])]
        held = squares if self.recipe.curvature.kind == "kfac" else [max(squares)]
        factored = self.recipe.solver.method == "exact" or self.recipe.solver.preconditioner == "kronecker"
        return tensors + 4 * sum(held) * (count + 2) + (8 * 4 * sum(held) if factored else 0)

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
            lines.append(
                f"to fetch: {human_bytes(self.bytes_to_fetch)}; memory: about {human_bytes(self.peak_memory_bytes)}; "
                f"disk: {human_bytes(self.disk_bytes)}"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {type(problem).__name__}: {problem}" for problem in self.problems]
        if not self.problems:
            lines.append("nothing stands in the way of this merge")
        return "\n".join(lines)


def layer_pattern(name: str) -> str:
    """Return a tensor's name with its layer numbers blanked (``encoder.layer.*.attention``)."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


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
