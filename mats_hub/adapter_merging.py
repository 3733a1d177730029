"""Merging LoRA adapters into a LoRA adapter: in factors where the mathematics allows, through one dense module otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.checkpoint import TORCH_DTYPES
from mats_hub.delta import LowRankDelta
from mats_hub.initialization import Context
from mats_hub.merging import check_cast, check_finite, deltas_at, make_context, merge_deltas
from mats_hub.plan import Action, Entry, Plan
from mats_hub.progress import Progress, silent
from mats_hub.recipe import Output
from mats_hub.report import TensorRecord

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
LINEAR_INITIALIZATIONS = ("average", "task_arithmetic")
"""Initializations that commute with a product from the left, so that they can be taken in factors."""


def merge_adapters(
    plan: Plan, folder: Path, device: torch.device, metadata: dict[str, str], progress: Progress | None = None
) -> list[TensorRecord]:
    """Write the merged adapter of a plan without problems into `folder`; the base's weights are not read.

    With a curvature that acts from the right alone (a Gram), or none, and a linear initialization, everything happens in
    the span of the experts' B factors: with QR([s₁B₁ … sₙBₙ]) = Q [R₁ … Rₙ] the task vectors are Q (Rᵢ Aᵢ), the system and
    conjugate gradient's steps are the same for the small right factors Rᵢ Aᵢ because Q has orthonormal columns, and the
    result Q X is of rank Σ rᵢ without truncation. Otherwise one module at a time is merged dense and cut by its singular
    values, the error being recorded.

    Returns:
        One record per tensor of the base.

    Raises:
        NumericalError: a non-finite value in a factor or in the result, naming the tensor.

    """
    from safetensors.torch import save_file

    show = progress or silent
    context = make_context(plan, device, show)
    merged = [entry for entry in plan.entries if entry.action in (Action.SOLVE, Action.INITIALIZE)]
    records = {entry.key: TensorRecord(entry.key, entry.action, entry.reason) for entry in plan.entries}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for entry in show(merged, len(merged), f"merging ({plan.recipe.method})"):
        module, pairs = _pairs(plan, entry.key)
        B, A, records[entry.key] = _merge_module(plan, entry, pairs, context, device)
        dtype = next(pair.A.dtype for pair in pairs if pair is not None)
        wanted = plan.recipe.output.dtype
        dtype = dtype if wanted == "stored" else getattr(torch, wanted)
        stored = next(text for text, known in TORCH_DTYPES.items() if known == dtype)
        for name, factor in (("A", A), ("B", B)):
            check_cast(factor, stored, entry.key)
            tensors[f"base_model.model.{module}.lora_{name}.weight"] = factor.to("cpu", dtype).contiguous()
        ranks[module] = len(A)
        transposed |= any(pair.transposed for pair in pairs if pair is not None)
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt", **metadata})
    _write_config(plan, folder, ranks, transposed)
    return list(records.values())


def _pairs(plan: Plan, key: str) -> tuple[str, list[LowRankDelta | None]]:
    """Return the module's name in the adapters, and each expert's factors (None where it changes nothing)."""
    module, pairs = "", []
    for expert in plan.experts:
        own = expert.names.get(key)
        pair = expert.adapter.delta(own) if expert.adapter and own else None
        if pair is not None and own is not None:
            module = module or own.removesuffix(".weight")
            for factor in (pair.A, pair.B):
                check_finite(factor, f"expert {expert.name!r}", key)
        pairs.append(pair)
    return module, pairs


def _merge_module(
    plan: Plan, entry: Entry, pairs: list[LowRankDelta | None], context: Context, device: torch.device
) -> tuple[Tensor, Tensor, TensorRecord]:
    """Return B ``[out, r]``, A ``[r, in]`` and the record of one module."""
    curvature, output = plan.recipe.curvature, plan.recipe.output
    right_acting = entry.action is Action.INITIALIZE or (curvature is not None and curvature.kind == "gram")
    total = sum(pair.A.shape[0] for pair in pairs if pair is not None)
    if right_acting and plan.recipe.initialization.method in LINEAR_INITIALIZATIONS:
        basis, coordinates = _in_span(pairs, device)
        merged, record = merge_deltas(plan, entry, coordinates, context, oriented=True)
        limit = len(merged)
    else:
        _, deltas = deltas_at(plan, entry.key, device)
        merged, record = merge_deltas(plan, entry, deltas, context)
        merged = merged.T if any(pair.transposed for pair in pairs if pair is not None) else merged
        basis, limit = None, min(total, *merged.shape)
    check_finite(merged, "the merged adapter", entry.key)
    B, A, error = _cut(basis, merged, output, limit)
    return B, A, replace(record, rank=len(A), truncation=error)


def _in_span(pairs: list[LowRankDelta | None], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return an orthonormal basis Q of the B factors' span ``[out, k]`` and each task vector's coordinates ``[k, in]``."""
    held = [pair for pair in pairs if pair is not None]
    wide = torch.float32 if device.type == "mps" else torch.float64
    Q, R = torch.linalg.qr(torch.cat([pair.scale * pair.B.to(device, wide) for pair in held], 1))
    blocks = iter(R.split([pair.B.shape[1] for pair in held], 1))
    zero = torch.zeros(len(R), held[0].A.shape[1], device=device)
    coordinates = [zero if pair is None else (next(blocks) @ pair.A.to(device, wide)).float() for pair in pairs]
    return Q.float(), coordinates


def _cut(basis: Tensor | None, merged: Tensor, output: Output, limit: int) -> tuple[Tensor, Tensor, float]:
    """Return B, A with B A = basis · merged cut to the wanted rank, and the relative error of the cut."""
    rank = min(output.rank or limit, *merged.shape)
    if basis is not None and rank >= len(merged):
        return basis, merged, 0.0
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    left = U[:, :rank] * S[:rank].sqrt()
    norm = float(S.norm())
    error = float(S[rank:].norm()) / norm if norm > 0 else 0.0
    return (left if basis is None else basis @ left), S[:rank, None].sqrt() * Vh[:rank], error


def _write_config(plan: Plan, folder: Path, ranks: dict[str, int], transposed: bool) -> None:
    """Write an adapter_config.json whose scale is one for every module: alpha equals the rank."""
    assert plan.base is not None
    task_types = {expert.adapter.options.get("task_type") for expert in plan.experts if expert.adapter}
    rank = max(ranks.values())
    patterns = {module: own for module, own in ranks.items() if own != rank}
    source = plan.base.source
    config: dict[str, Any] = {
        "peft_type": "LORA",
        # For classifiers PEFT would expect a head in the adapter; the merged one's heads are kept per task, beside it.
        "task_type": task_types.pop() if len(task_types) == 1 and not any(plan.kept.values()) else None,
        "base_model_name_or_path": source.repo_id or source.name,
        "revision": source.commit,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
