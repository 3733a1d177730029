"""Initializations: functions from the experts' task vectors at one weight to a starting task vector.

Each has the signature ``(deltas, weights, context, *, options…)``, is pure, keeps shape, dtype and device, and is one
row below. To add one: a file here, a row here, an options class in `mats_hub.initialization_options`, a conformance row.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mats_hub.initialization.average import average
from mats_hub.initialization.breadcrumbs import breadcrumbs
from mats_hub.initialization.consensus import consensus
from mats_hub.initialization.context import Context
from mats_hub.initialization.dare import dare, dare_ties
from mats_hub.initialization.della import della
from mats_hub.initialization.knots import knots
from mats_hub.initialization.model_stock import model_stock
from mats_hub.initialization.slerp import slerp
from mats_hub.initialization.spectral import iso_c, iso_cts, tsvm
from mats_hub.initialization.task_arithmetic import task_arithmetic
from mats_hub.initialization.ties import ties

INITIALIZATIONS: dict[str, Callable[..., Tensor]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "slerp": slerp,
    "model_stock": model_stock,
    "tsvm": tsvm,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "knots": knots,
    "consensus": consensus,
}

__all__ = ["INITIALIZATIONS", "Context"]
