"""How sums are stored: triangles of symmetric matrices, narrow dtypes with scales of their own, several files with an index."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.checkpoint import TORCH_DTYPES, CheckpointWriter
from mats_hub.errors import CheckpointError, StatisticsError
from mats_hub.statistics.accumulate import Sums, is_symmetric
from mats_hub.tensor_header import TensorHeader, read_header

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


def encoded_headers(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorHeader]:
    """Return the headers of what `encode` makes of a sum of this shape."""
    symmetric, narrow = is_symmetric(key), dtype != torch.float32 and len(shape) > 1
    stored = (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2) if symmetric else shape
    found = {key: TensorHeader(DTYPE_NAMES[dtype] if narrow else "F32", stored, "")}
    return found | ({key + SCALE: TensorHeader("F32", shape[:-1] if symmetric else (1,), "")} if narrow else {})


def write(
    headers: Mapping[str, TensorHeader],
    tensor: Callable[[str], Tensor],
    path: Path,
    metadata: Mapping[str, str],
    max_shard_bytes: float,
) -> Path:
    """Write tensors, one in memory at a time, to a file, or to several with an index beside them.

    Each file appears complete or not at all, the index last.

    Args:
        headers: what is written.
        tensor: name → the tensor.
        path: the file, when it is one.
        metadata: text for every file.
        max_shard_bytes: the largest file.

    Returns:
        The file, or the index.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    index = path.name + INDEX_ENDING
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as stage:
        with CheckpointWriter(
            Path(stage), headers, max_shard_bytes, metadata, path.name.removesuffix(".safetensors")
        ) as writer:
            for name in writer.order:
                writer.write(name, tensor(name))
        several = len(writer.files) > 1
        for name in (*writer.files, index) if several else (writer.files[0],):
            os.replace(Path(stage) / name, path.with_name(name if several else path.name))
    if several:
        path.unlink(missing_ok=True)
    return path.with_name(index) if several else path


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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of sums in a file that `write_sums` wrote, read when they are asked for and not kept."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = [name.removeprefix("tensors:") for name in file.keys() if name.startswith("tensors:")]  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        from safetensors import safe_open

        if key not in self._names:
            raise KeyError(key)
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(f"tensors:{key}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
