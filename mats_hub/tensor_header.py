"""The header of a safetensors file: which tensors it holds, and where; checked before anything is believed of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mats_hub.errors import CheckpointError

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

TORCH_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""What torch calls the dtypes of safetensors."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor: dtype (as safetensors spells it), shape and the file it is in."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def numel(self) -> int:
        """The number of entries."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether the entries are real numbers, so that they can be merged."""
        return self.dtype.startswith(("F", "BF"))


def read_header(path: Path, spec: str) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Return the tensors and the metadata in a local safetensors file's header.

    Raises:
        CheckpointError: the file is cut short or its header is malformed.

    """
    size, label = path.stat().st_size, f"{spec!r}: {path.name}"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, 100_000_000):
            raise CheckpointError(f"{label} is not a safetensors file or is cut short ({size} bytes); fetch it again")
        try:
            raw = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{label} has a malformed safetensors header; fetch it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{label} has a malformed safetensors header; fetch it again")
    metadata = raw.pop("__metadata__", {})
    return check_header(raw, size - 8 - length, spec, path.name), metadata if isinstance(metadata, dict) else {}


def tensor_offsets(path: Path) -> dict[str, int]:
    """Return where each tensor begins in a well-formed local safetensors file, in bytes from its beginning."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in raw.items() if name != "__metadata__"}


def check_header(raw: dict[str, Any], data_bytes: int | None, spec: str, filename: str) -> dict[str, TensorHeader]:
    """Return the tensors of a parsed header after checking dtypes, shapes and offsets.

    Args:
        raw: the header without its metadata.
        data_bytes: the bytes after the header; None when they are unknown.
        spec: the model's name in messages.
        filename: the file's name.

    Raises:
        CheckpointError: an entry is malformed, or the data are shorter than the header says.

    """
    headers, label = {}, f"{spec!r}: {filename}"
    for name, entry in raw.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            well_formed = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
            header = TensorHeader(dtype, shape, filename)
            well_formed = well_formed and end - begin == header.nbytes
        except (KeyError, TypeError, ValueError):
            well_formed = False
        if not well_formed:
            raise CheckpointError(
                f"{label}: the header's entry for tensor {name!r} is malformed or of an unknown dtype"
            )
        if data_bytes is not None and end > data_bytes:
            raise CheckpointError(
                f"{label} is cut short: tensor {name!r} ends at byte {end} of the data, but only {data_bytes} are there; "
                "fetch the file again"
            )
        headers[name] = header
    return headers
