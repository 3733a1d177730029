"""What a merge did: one record per tensor, and everything a card or a replay needs to know."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mats_hub.errors import CheckpointError

REPORT_FILE = "mats_report.json"
MERGED = "merged"
"""The name under which results of the merged model itself are kept."""


@dataclass(frozen=True)
class TensorRecord:
    """What happened to one tensor.

    Attributes:
        key: its name.
        action: solve, initialize, copy, keep per task, tied.
        reason: why.
        outcome: how the solve ended; '' when nothing was solved.
        iterations: conjugate-gradient steps.
        residuals: ‖b − A x‖ / ‖b‖ at the initialization and after each step.
        residual: the same for the solution, recomputed.
        initialization_norm: Frobenius norm of the initialization's task vector.
        solution_norm: Frobenius norm of the merged task vector.
        step_norm: Frobenius norm of solution minus initialization.
        expert_norms: Frobenius norms of the experts' task vectors.
        rank: rank of the written factors, when an adapter is written.
        truncation: relative Frobenius error of cutting the merged task vector to that rank.
        weighted_truncation: the same in the norm of the curvature, in which the cut is the best one of that rank.
        outside: for a solve within a subspace, ‖b − A x‖ / ‖b‖ in the whole space.

    """

    key: str
    action: str
    reason: str
    outcome: str = ""
    iterations: int = 0
    residuals: tuple[float, ...] = ()
    residual: float | None = None
    initialization_norm: float | None = None
    solution_norm: float | None = None
    step_norm: float | None = None
    expert_norms: tuple[float, ...] = ()
    rank: int | None = None
    truncation: float | None = None
    weighted_truncation: float | None = None
    outside: float | None = None

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> TensorRecord:
        """Return the record in a mapping read from JSON.

        Raises:
            KeyError: a field is not there.
            TypeError: it holds something else.

        """
        return cls(**{**content, **{name: tuple(content[name]) for name in ("residuals", "expert_norms")}})


Watch = Callable[[TensorRecord], None]
"""Called with the record of every tensor as soon as it is merged."""


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        recipe: the recipe, every value written out and every model pinned.
        base: facts about the base; None when there is none.
        experts: facts about each expert: name, model, kind, weight, licence, fingerprint, tensors kept, statistics.
        tensors: one record per tensor, in the order of the file.
        environment: versions, device class, compute dtype.
        files: sha256 of each weight file.
        results: rows of scores: task, metric, model (a method's or an expert's name), value; of a data set on the Hub also
            dataset, and of a registered benchmark task_id.
        notes: what a careful reader would want to know.
        parent: the merge that this is a variant of, ``owner/name@commit``.
        bundle: of compressed experts: for each task λ, bytes and fraction kept of its mask; bytes of all, of the experts as they
            are, and of as many full checkpoints.

    """

    recipe: dict[str, Any]
    base: dict[str, Any] | None = None
    experts: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[TensorRecord] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parent: str | None = None
    bundle: dict[str, Any] | None = None

    @property
    def solved(self) -> list[TensorRecord]:
        """The records of the tensors that were solved for."""
        return [record for record in self.tensors if record.action == "solve"]

    def write(self, folder: Path) -> None:
        """Write the report as JSON into a merged model's folder."""
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> MergeReport:
        """Return the report in a mapping read from JSON.

        Raises:
            CheckpointError: it is none.

        """
        try:
            records = [TensorRecord.from_mapping(record) for record in content["tensors"]]
            return cls(**{**content, "tensors": records})
        except (KeyError, TypeError):
            raise CheckpointError(f"{REPORT_FILE} is no report of a merge by this package; fetch it again") from None
