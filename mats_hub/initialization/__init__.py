"""Initializations: functions from the experts' task vectors at one weight to a starting task vector.

Each has the signature ``(deltas, weights, context, *, options…)``, is pure, keeps shape, dtype and device, and is one
row below. To add one: a file here, a row here, an options class and a row in `mats_hub.recipe`, a conformance row.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mats_hub.initialization.average import average
from mats_hub.initialization.context import Context
from mats_hub.initialization.dare import dare
from mats_hub.initialization.task_arithmetic import task_arithmetic
from mats_hub.initialization.ties import MagnitudeRank, ties

INITIALIZATIONS: dict[str, Callable[..., Tensor]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
}

__all__ = ["INITIALIZATIONS", "Context", "MagnitudeRank"]
