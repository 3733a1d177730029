"""Merging adapters into an adapter: in factors where the mathematics allows, through one dense module otherwise."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.adapter import Ia3Adapter
from mats_hub.architecture import describe
from mats_hub.checkpoint import CheckpointWriter
from mats_hub.curvature import Gram, LowRank
from mats_hub.delta import LowRankDelta
from mats_hub.initialization import Context
from mats_hub.journal import Journal
from mats_hub.linear_system import LinearSystem
from mats_hub.lora import Factors, LoraAdapter
from mats_hub.matching import Merged, merge_deltas
from mats_hub.merging import make_context
from mats_hub.plan import MATRIX_KINDS, OUTPUT_DTYPES, Action, Entry, Plan
from mats_hub.preconditioner import nearest_kronecker
from mats_hub.progress import Progress, silent
from mats_hub.reading import check_cast, check_finite, compute_dtype, deltas_at, over_tensors
from mats_hub.report import TensorRecord, Watch
from mats_hub.tensor_header import DTYPE_BYTES, TensorHeader

ADAPTER_STEM = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


def merge_adapters(
    plan: Plan,
    folder: Path,
    device: torch.device,
    metadata: dict[str, str],
    progress: Progress | None = None,
    watch: Watch | None = None,
    journal: Journal | None = None,
) -> list[TensorRecord]:
    """Write the merged adapter of a plan without problems into `folder`, tensor by tensor.

    The base's weights are not read, but for tensors that an expert holds whole. A vector of (IA)³ is merged as it is. For
    LoRA, with QR([s₁B₁ … sₙBₙ]) = Q [R₁ … Rₙ] the task vectors are Q (Rᵢ Aᵢ). With a linear initialization and a
    curvature that acts from the right alone (a Gram), the system and conjugate gradient's steps are the same for the small
    coordinates Rᵢ Aᵢ, because Q has orthonormal columns, and the result Q X is of rank Σ rᵢ without truncation; where the
    curvature comes from the task vectors themselves, or there is none, the same is done from the right, so that all is
    computed on Σ rᵢ × Σ rᵢ matrices. K-FAC can be solved within the span of Q as well, which leaves out what lies outside
    and records it. Otherwise one module at a time is merged dense. A result of too high a rank is cut, in the norm of the
    curvature where there is one, and the error is recorded.

    Returns:
        One record per tensor of the base (or vector).

    Raises:
        NumericalError: a non-finite value in a factor or in the result, naming the tensor.

    """
    show = progress or silent
    context = make_context(plan, device, show, journal or Journal(folder))
    parts = _parts(plan)
    records = {entry.key: TensorRecord(entry.key, entry.action, entry.reason) for entry in plan.entries}
    layout = {name: header for part in parts for name, header in part.headers.items()}
    with CheckpointWriter(folder, layout, math.inf, metadata, ADAPTER_STEM) as writer:
        merge = partial(_merge_part, plan, context=context, device=device)
        merging = over_tensors(plan, parts, lambda part: plan.working_bytes(part.entry), device, merge)
        for tensors, record in show(merging, len(parts), f"merging ({plan.recipe.method})"):
            records[record.key] = record
            if watch:
                watch(record)
            for name, tensor in tensors.items():
                check_cast(check_finite(tensor, "the merged adapter", name), layout[name].dtype, name)
                writer.write(name, tensor)
    _write_config(plan, folder, parts)
    return list(records.values())


@dataclass(frozen=True)
class _Part:
    """One merged tensor of the reference in the merged adapter.

    Attributes:
        entry: the tensor.
        own: its name in the adapter's model.
        headers: the tensors it is written as, in the order B, A for factors.
        factors: for factors, those of the first expert that has some: how they are stored.
        rank: of the written factors; 0 where the tensor is written whole.

    """

    entry: Entry
    own: str
    headers: dict[str, TensorHeader]
    factors: Factors | None = None
    rank: int = 0

    @property
    def module(self) -> str:
        return self.own.rpartition(".")[0]


def _parts(plan: Plan) -> list[_Part]:
    """Return what the merged adapter holds; every tensor's rank, dtype and shape are known from headers."""
    parts: list[_Part] = []
    own_names, wanted = _own_names(plan), OUTPUT_DTYPES.get(plan.recipe.output.dtype)
    for entry in reversed(plan.merged_entries):
        holders = [(expert, expert.names[entry.key]) for expert in plan.experts if expert.holds(entry.key)]
        own = own_names[entry.key]
        files = [expert.checkpoint.headers[name] for expert, own in holders for name in expert.files(own)]
        dtype = wanted or max((header.dtype for header in files), key=lambda text: DTYPE_BYTES[text])
        held = [
            (adapter.factors[name], adapter.rank(name))
            for adapter, name in ((expert.adapter, name) for expert, name in holders)
            if isinstance(adapter, LoraAdapter) and name in adapter.factors
        ]
        if len(held) < len(holders):
            parts.append(_Part(entry, own, {PREFIX + own: TensorHeader(dtype, entry.header.shape, "")}))
            continue
        factors = min((f for f, _ in held), key=lambda f: f.form == "parameter")  # a bare weight may be a module's, too
        total = sum(r for _, r in held)
        largest = min(*_matrix(factors), *([total] if plan.in_factors(entry) else []))
        rank = min(plan.recipe.output.rank or total, largest)
        deeper = sum(part.factors is not None and part.module == own.rpartition(".")[0] for part in parts)
        names, shapes = _names(own, factors, deeper), _stored_shapes(factors, rank)
        headers = {name: TensorHeader(dtype, shape, "") for name, shape in zip(names, shapes, strict=True)}
        parts.append(_Part(entry, own, headers, factors, rank))
    wrapped = {part.module for part in parts if part.factors}
    return [_inside(part) if part.factors is None and part.module in wrapped else part for part in parts[::-1]]


def _inside(part: _Part) -> _Part:
    """Return a bias of a module that has factors under the name it has inside PEFT's wrapper."""
    leaf = part.own.rpartition(".")[2]
    return replace(part, headers={f"{PREFIX}{part.module}.base_layer.{leaf}": next(iter(part.headers.values()))})


def _own_names(plan: Plan) -> dict[str, str]:
    """Return what each merged tensor is called in the merged adapter's model.

    The experts call it so, but for the prefix of the body in a model with a head: where one of them is an adapter of the
    body alone, the merged one is, too. Adapters of a part of the base become one of the whole.
    """
    facts = describe(plan.reference.config)
    if any(expert.part for expert in plan.experts):
        in_model = facts.model_names
        return {entry.key: in_model.get(entry.key, entry.key) for entry in plan.merged_entries}
    names = {e.key: next(x.names[e.key] for x in plan.experts if x.holds(e.key)) for e in plan.merged_entries}
    in_body = [key for key in names if key.startswith(facts.prefix)]
    held = (expert.names[key] for key in in_body for expert in plan.experts if expert.holds(key))
    if all(name.startswith(facts.body) for name in held):
        return names
    return names | {key: names[key].removeprefix(facts.body) for key in in_body}


def _matrix(factors: Factors) -> tuple[int, int]:
    """Return out and in of the matrix that the factors' product is."""
    if factors.form == "convolution":
        return factors.shape[0], math.prod(factors.shape[1:])
    out, inner = factors.shape[-2:]
    return (inner, out) if factors.transposed else (out, inner)


def _names(own: str, factors: Factors, deeper: int) -> tuple[str, str]:
    """Return PEFT's names of B and A; it wraps a module once for each bare parameter, the first one's the deepest."""
    module = PREFIX + own.rpartition(".")[0] + ".base_layer" * (deeper if factors.form == "stacked" else 0)
    kind, ending = ("embedding_", "") if factors.form == "embedding" else ("", ".weight")
    return f"{module}.lora_{kind}B{ending}", f"{module}.lora_{kind}A{ending}"


def _stored_shapes(factors: Factors, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    out, inner = _matrix(factors)
    if factors.form == "convolution":
        return (out, rank, *(1 for _ in factors.shape[2:])), (rank, *factors.shape[1:])
    rows = rank * (factors.shape[0] if factors.form == "stacked" else 1)
    return (out, rows), (rows, inner)


def _merge_part(
    plan: Plan, part: _Part, context: Context, device: torch.device
) -> tuple[dict[str, Tensor], TensorRecord]:
    """Return the tensors of one part, by their names, and its record."""
    entry = part.entry
    if part.factors is None:
        origin, deltas = deltas_at(plan, entry, device)
        merged = merge_deltas(plan, entry, deltas, context, stored=True)
        origin = origin + 1 if _is_vector(part.own) else origin
        return {next(iter(part.headers)): origin + merged.value}, merged.record
    # A bare parameter's factors may stand the other way round than those of the module it belongs to.
    turned = entry.transposed if _solves_matrices(plan, entry) else part.factors.transposed
    left, right, merged = _merge_factors(plan, entry, turned, context, device)
    B, A, errors = cut(merged.value, part.rank, _metric(merged.system))
    B = B if left is None else left @ B
    A = A if right is None else A @ right.mT
    B, A = (B, A) if turned == part.factors.transposed else (A.mT, B.mT)
    if part.factors.form == "stacked":
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    stored = {name: t.reshape(h.shape) for t, (name, h) in zip((B, A), part.headers.items(), strict=True)}
    return stored, replace(merged.record, rank=part.rank, **errors)


def _is_vector(own: str) -> bool:
    """Tell whether a tensor is an (IA)³ vector, which starts from ones."""
    return own.endswith(".ia3_l")


def _solves_matrices(plan: Plan, entry: Entry) -> bool:
    """Tell whether a tensor is solved for with a curvature that acts on ``[out, in]`` matrices."""
    curvature = plan.recipe.curvature
    return entry.action is Action.SOLVE and curvature is not None and curvature.kind in MATRIX_KINDS


def _merge_factors(
    plan: Plan, entry: Entry, turned: bool, context: Context, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Merged]:
    """Merge one weight's factors; return bases Q, P and the merge of coordinates X.

    Q X Pᵀ is the merged weight, or with `turned` its transpose; a basis is None where nothing was reduced.
    """
    dtype = compute_dtype(plan, device)
    kind = plan.recipe.curvature.kind if entry.action is Action.SOLVE and plan.recipe.curvature else None
    pairs = [_pair(plan, index, entry.key, turned) for index in range(len(plan.experts))]
    if not plan.in_factors(entry):
        _, deltas = deltas_at(plan, entry, device)
        merged = merge_deltas(plan, entry, deltas, context, stored=True)
        return None, None, replace(merged, value=next(pair for pair in pairs if pair).as_matrix(merged.value))
    wide = torch.float32 if device.type == "mps" else torch.float64
    factors = [(p.scale * p.B.to(device, wide), p.A.to(device, wide)) if p else None for p in pairs]
    left, rows = _basis([f and f[0] for f in factors])
    right = None
    columns = [f and f[1] for f in factors]
    whole = plan.recipe.curvature is None or plan.recipe.curvature.off_diagonal == 1
    if kind is None or (kind == "task_vector" and whole):  # nothing acts on the inputs but the task vectors themselves
        right, rotated = _basis([f and f[1].mT for f in factors])
        columns = [None if c is None else c.mT for c in rotated]
    parts = [None if r is None or c is None else (r @ c).to(dtype) for r, c in zip(rows, columns, strict=True)]
    zero = torch.zeros_like(next(part for part in parts if part is not None))
    deltas = [zero if part is None else part for part in parts]
    left = left.to(dtype)
    width = next(f[1].shape[-1] for f in factors if f)
    merged = merge_deltas(plan, entry, deltas, context, basis=left if right is None else None, width=width)
    return left, None if right is None else right.to(dtype), merged


def _pair(plan: Plan, index: int, key: str, turned: bool) -> LowRankDelta | None:
    """Return an expert's factors of a tensor (turned: of its transpose), or None where it changes nothing."""
    expert = plan.experts[index]
    delta = expert.adapter.delta(expert.names[key]) if expert.adapter and expert.holds(key) else None
    assert delta is None or isinstance(delta, LowRankDelta)
    for factor in (delta.A, delta.B) if delta else ():
        check_finite(factor, f"expert {expert.name!r}", key)
    if delta is None or delta.transposed == turned:
        return delta
    return replace(delta, B=delta.A.mT, A=delta.B.mT, transposed=turned)


def _basis(blocks: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Return orthonormal columns Q that span those of all blocks, and each block's coordinates in them."""
    held = [block for block in blocks if block is not None]
    Q, R = torch.linalg.qr(torch.cat(held, -1))
    coordinates = iter(R.split([block.shape[-1] for block in held], -1))
    return Q, [None if block is None else next(coordinates) for block in blocks]


def _metric(system: LinearSystem | None) -> Gram | LowRank | None:
    """Return the P of the norm tr(X P Xᵀ) that the curvature puts on X; None is the Frobenius norm.

    Of K-FAC only the inputs' side is taken: the projection on the left is orthogonal then, and nothing can grow where no
    expert's data ever was.
    """
    if system is None:
        return None
    if isinstance(system.operator, Gram | LowRank):
        return system.operator
    near = nearest_kronecker(system)
    if near is None:
        return None
    return near.input if isinstance(near.input, LowRank) else Gram(near.input)


def cut(value: Tensor, rank: int, metric: Gram | LowRank | None = None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Factor a matrix as B A of a given rank, with the least error that this rank allows.

    Without a metric that is the truncated singular value decomposition. In the norm ‖X‖² = tr(X P Xᵀ) it is U Uᵀ X, with U
    the leading eigenvectors of X P Xᵀ, which are the left singular vectors of X P^½.

    Args:
        value: ``[…, m, n]``.
        rank: of the product; nothing is cut when it is m or n.
        metric: P ``[n, n]``, acting from the right.

    Returns:
        B ``[…, m, rank]``, A ``[…, rank, n]`` and the relative errors, as fields of a `TensorRecord`.

    """
    if rank in value.shape[-2:]:
        eye = torch.eye(rank, dtype=value.dtype, device=value.device).expand(*value.shape[:-2], rank, rank)
        return *((eye, value) if rank == value.shape[-2] else (value, eye)), {"truncation": 0.0}
    if metric is None:
        U, S, Vh = torch.linalg.svd(value, full_matrices=False)
        root = S[..., :rank].sqrt()
        error = _ratio(S[..., rank:], S)
        return U[..., :rank] * root[..., None, :], root[..., None] * Vh[..., :rank, :], {"truncation": error}
    values, vectors = torch.linalg.eigh(metric.matvec(value) @ value.mT)
    B = vectors[..., -rank:]
    A, spectrum = B.mT @ value, values.clamp(min=0).sqrt()
    errors = {
        "truncation": _ratio(value - B @ A, value),
        "weighted_truncation": _ratio(spectrum[..., :-rank], spectrum),
    }
    return B, A, errors


def _ratio(part: Tensor, whole: Tensor) -> float:
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else 0.0


def _write_config(plan: Plan, folder: Path, parts: list[_Part]) -> None:
    """Write an adapter_config.json with which PEFT gives the merged adapter its effect."""
    assert plan.base is not None
    adapters = [expert.adapter for expert in plan.experts if expert.adapter]
    task_types = {adapter.options.get("task_type") for adapter in adapters}
    source = plan.base.source
    whole = [part for part in parts if part.factors is None and not _is_vector(part.own)]
    config: dict[str, Any] = {
        "peft_type": adapters[0].options["peft_type"],
        # For classifiers PEFT would expect a head in the adapter; the merged one's heads are kept per task, beside it.
        "task_type": task_types.pop() if len(task_types) == 1 and not any(plan.kept.values()) else None,
        "base_model_name_or_path": source.hub_id or source.name,
        "revision": source.commit,
        "modules_to_save": sorted({part.module for part in whole if not part.own.endswith(".bias")}) or None,
        "inference_mode": True,
        **(_ia3_config(plan, parts) if isinstance(adapters[0], Ia3Adapter) else _lora_config(parts, whole)),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _lora_config(parts: list[_Part], whole: list[_Part]) -> dict[str, Any]:
    """Return the fields of LoRA; its scale is one for every module: alpha equals the rank."""
    factored = [part for part in parts if part.factors]
    bare = [part for part in factored if part.factors and part.factors.form in ("stacked", "parameter")]
    replaced = {part.module for part in whole if not part.own.endswith(".bias")}
    rank = max((part.rank for part in factored), default=1)
    names = {part.entry.key: part.own if part in bare else part.module for part in factored}
    patterns = {re.escape(names[part.entry.key]): part.rank for part in factored if part.rank != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": [part.module for part in factored if part not in bare],
        "target_parameters": [part.own for part in bare] or None,
        "fan_in_fan_out": any(p.factors.transposed for p in factored if p.factors and p.factors.form == "linear"),
        "lora_dropout": 0.0,
        "bias": "all" if any(part.own.endswith(".bias") and part.module not in replaced for part in whole) else "none",
        "use_rslora": False,
    }


def _ia3_config(plan: Plan, parts: list[_Part]) -> dict[str, Any]:
    """Return the fields of (IA)³; a vector scales inputs where the experts' configs say so."""
    vectors = [part for part in parts if _is_vector(part.own)]
    return {
        "target_modules": [part.module for part in vectors],
        "feedforward_modules": [part.module for part in vectors if _scales_inputs(plan, part.entry.key)],
        "fan_in_fan_out": any(
            expert.adapter.options.get("fan_in_fan_out") for expert in plan.experts if expert.adapter
        ),
    }


def _scales_inputs(plan: Plan, key: str) -> bool:
    """Tell whether the config of the first expert that has a vector says that it scales its module's inputs."""
    expert = next(expert for expert in plan.experts if expert.holds(key))
    assert expert.adapter is not None
    module, named = expert.names[key].rpartition(".")[0], expert.adapter.options.get("feedforward_modules") or []
    if isinstance(named, str):  # as in PEFT: one regular expression, or endings
        return re.fullmatch(named, module) is not None
    return any(module.endswith(ending) for ending in named)
