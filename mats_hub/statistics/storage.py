"""How sums are stored: triangles of symmetric matrices, narrow dtypes with scales of their own, several files with an index."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.checkpoint import TORCH_DTYPES, shard_layout, shard_names
from mats_hub.errors import CheckpointError, StatisticsError
from mats_hub.source import TensorHeader, give_usual_mode, read_header
from mats_hub.statistics.accumulate import Sums, is_symmetric

INDEX_ENDING = ".index.json"
SCALE = ".scale"
"""Ending of the tensor that a narrow one is multiplied by."""

TENSORS = ("tensors", "probes")
"""The fields of `Sums` that hold tensors."""

STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
Fetch = Callable[[str], Path]


def encode(key: str, value: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what one sum is stored as.

    Of a symmetric matrix the upper triangle is stored. In a narrow dtype its entries are divided by the roots of its diagonal,
    a squared gradient is stored by its root, and what is left is divided by its largest entry: neither tiny nor huge sums
    under- or overflow, and a diagonal stays exact. Vectors stay in float32.
    """
    value = value.detach().cpu()
    symmetric = is_symmetric(key)
    if dtype == torch.float32 or value.dim() < 2:
        return {key: packed(value) if symmetric else value.contiguous()}
    if symmetric:
        scale = value.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        divisor = torch.where(scale > 0, scale, 1)
        return {
            key: packed(value / divisor[..., None] / divisor[..., None, :]).to(dtype),
            key + SCALE: scale.contiguous(),
        }
    value = value.sqrt() if key.endswith(".fisher") else value
    largest = value.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return {key: (value / largest).to(dtype).contiguous(), key + SCALE: largest.reshape(1)}


def decode(key: str, stored: Tensor, scale: Tensor | None, is_packed: bool) -> Tensor:
    """Return the sum that `encode` stored."""
    value = unpacked(stored.float() if scale is not None else stored) if is_packed else stored
    if scale is None:
        return value
    if not is_packed:
        value = value.float() * scale
        return value.square() if key.endswith(".fisher") else value
    value = value * scale[..., None] * scale[..., None, :]
    value.diagonal(dim1=-2, dim2=-1).copy_(scale.square())
    return value


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], max_shard_bytes: float) -> Path:
    """Write tensors to a file, or to several with an index beside them; each appears complete or not at all.

    Returns:
        The file, or the index.

    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    headers = {key: TensorHeader(DTYPE_NAMES[t.dtype], tuple(t.shape), "") for key, t in tensors.items()}
    shards = shard_layout(headers, max_shard_bytes)
    names = [path.name] if len(shards) == 1 else list(shard_names(len(shards), path.name.removesuffix(".safetensors")))
    for name, keys in zip(names, shards, strict=True):
        partial = path.with_name(f".{name}.partial")
        # One entry of metadata alone: safetensors writes several in random order.
        save_file({key: tensors[key] for key in keys}, partial, metadata=dict(metadata))
        give_usual_mode(partial)
        os.replace(partial, path.with_name(name))
    if len(shards) == 1:
        return path
    index = path.with_name(path.name + INDEX_ENDING)
    files = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index.write_text(json.dumps({"metadata": dict(metadata), "weight_map": files}, indent=2) + "\n", encoding="utf-8")
    path.unlink(missing_ok=True)
    return index


def read(path: Path, fetch: Fetch) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Return the headers and the metadata of a file, or of all files that an index names.

    Raises:
        StatisticsError: the index is malformed, or names a file outside its folder.
        CheckpointError: a file is cut short.

    """
    label = str(path.parent.name or path.name)
    if not path.name.endswith(INDEX_ENDING):
        return read_header(path, label)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = dict.fromkeys(str(name) for name in content["weight_map"].values())
        metadata = {str(key): str(value) for key, value in content["metadata"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StatisticsError(f"{path.name!r} is no index of a statistics file; fetch it again") from None
    headers: dict[str, TensorHeader] = {}
    for name in names:
        if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
            raise StatisticsError(f"{path.name!r} names {name!r}, which is no plain file name beside it; not followed")
        headers |= read_header(fetch(name), label)[0]
    return headers, metadata


def packed(matrix: Tensor) -> Tensor:
    """Return the upper triangle of symmetric matrices ``[…, n, n]``, row by row: ``[…, n (n + 1) / 2]``."""
    return matrix[..., torch.ones(matrix.shape[-2:], dtype=torch.bool).triu()].contiguous()


def unpacked(triangle: Tensor) -> Tensor:
    """Return the symmetric matrices ``[…, n, n]`` of upper triangles ``[…, n (n + 1) / 2]``.

    Raises:
        CheckpointError: there is no such n.

    """
    n = side(triangle.shape[-1])
    if n * (n + 1) != 2 * triangle.shape[-1]:
        raise CheckpointError(f"{triangle.shape[-1]} entries are no triangle of a matrix")
    matrix = torch.zeros(*triangle.shape[:-1], n, n, dtype=triangle.dtype)
    matrix[..., torch.ones(n, n, dtype=torch.bool).triu()] = triangle
    return matrix + matrix.triu(1).mT


def side(entries: int) -> int:
    """Return n of a triangle with n (n + 1) / 2 entries."""
    return (math.isqrt(8 * entries + 1) - 1) // 2


def write_sums(sums: Sums, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write sums as they are, exactly, to be added to later; the file appears complete or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in vars(sums).items() if name not in TENSORS}
    tensors = {f"{kind}:{key}": t.contiguous() for kind in TENSORS for key, t in getattr(sums, kind).items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={"sums": json.dumps({"content": content, "metadata": dict(metadata)})})
    os.replace(partial, path)


def read_sums(path: Path) -> tuple[Sums, dict[str, Any]] | None:
    """Return sums that were written and their metadata, or None where there is no such file, or a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["sums"])
            tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in TENSORS}
            for name in file.keys():  # noqa: SIM118
                kind, _, key = name.partition(":")
                tensors[kind][key] = file.get_tensor(name)
        uses = {name: [(kind, module) for kind, module in uses] for name, uses in found["content"].pop("uses").items()}
        return Sums(**{**found["content"], **tensors, "uses": uses}), found["metadata"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
