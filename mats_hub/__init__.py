"""Merge fine-tuned models from the Hugging Face Hub by matching them in their task parameter subspaces (MaTS).

A merge, from floor to floor:

    source, checkpoint, adapter, expert    where the files are; tensors and task vectors, read one at a time
    pickles                                safetensors of what is stored in no other way
    statistics                             what matters to each task, measured once per expert
    curvature                              the same as a linear map on one weight
    linear_system                          Σ wᵢ Cᵢ x = Σ wᵢ Cᵢ δᵢ
    initialization                         where the solve starts: average, task arithmetic, TIES, DARE
    solver, preconditioner, closed_form    conjugate gradient for k steps, or exactly
    recipe, plan                           what is asked for, and what will happen to every tensor
    reading, thresholds, matching, merging task vectors in parts or whole, one tensor's system, the streaming loop
    adapter_merging                        the same for adapters merged into an adapter, in factors
    companions                             tokenizer, processor and whatever else a model is used with
    merged_model, card, hub                a folder that is an ordinary Hub repository, its card, its push
    compressing, bundle                    experts as masks of one multi-task vector, and back
    candidates, choosing                   many recipes on one reading, scored: settings, methods
    conflict                               where experts agree and where they pull apart
    browsing, replaying                    what others published: found, traced back, made again
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mats_hub.browsing import browse, lineage
    from mats_hub.choosing import compare, tune
    from mats_hub.compressing import compress
    from mats_hub.conflict import agreement
    from mats_hub.errors import MatsError
    from mats_hub.evaluation import evaluate
    from mats_hub.hub import push, push_statistics
    from mats_hub.loading import load
    from mats_hub.merged_model import MergedModel, merge
    from mats_hub.methods import METHODS
    from mats_hub.pickles import convert
    from mats_hub.plan import Plan
    from mats_hub.planning import make_plan
    from mats_hub.recipe import Recipe
    from mats_hub.replaying import replay
    from mats_hub.statistics import Statistics, compute_statistics

_HOMES = {
    "METHODS": "methods",
    "MatsError": "errors",
    "MergedModel": "merged_model",
    "Plan": "plan",
    "Recipe": "recipe",
    "Statistics": "statistics",
    "agreement": "conflict",
    "browse": "browsing",
    "compare": "choosing",
    "compress": "compressing",
    "compute_statistics": "statistics",
    "convert": "pickles",
    "evaluate": "evaluation",
    "lineage": "browsing",
    "load": "loading",
    "make_plan": "planning",
    "merge": "merged_model",
    "push": "hub",
    "push_statistics": "hub",
    "replay": "replaying",
    "tune": "choosing",
}
"""Public name → its module; loaded when first used, so that ``import mats_hub`` loads nothing heavy."""

__all__ = [
    "METHODS",
    "MatsError",
    "MergedModel",
    "Plan",
    "Recipe",
    "Statistics",
    "__version__",
    "agreement",
    "browse",
    "compare",
    "compress",
    "compute_statistics",
    "convert",
    "evaluate",
    "lineage",
    "load",
    "make_plan",
    "merge",
    "push",
    "push_statistics",
    "replay",
    "tune",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'mats_hub' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mats_hub.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
