"""Checkpoints: open one lazily, tensor by tensor, and write one shard by shard without ever holding a shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mats_hub.errors import CheckpointError
from mats_hub.source import DTYPE_BYTES, TORCH_DTYPE_NAMES, Source, TensorHeader
from mats_hub.streaming import StreamedFile

TORCH_DTYPES = {name: getattr(torch, own) for name, own in TORCH_DTYPE_NAMES.items()}


CONFIG_FIELDS: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "model_type": (str,),
    "id2label": (dict,),
    "num_labels": (int,),
    "tie_word_embeddings": (bool,),
    "quantization_config": (dict,),
}
"""The fields of a config.json that are read here, and what they may hold beside null."""


def check_fields(content: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]], label: str) -> None:
    """Check the types of a JSON object's fields; absent ones and null are fine, and a list must be of texts.

    Raises:
        CheckpointError: a field holds something else.

    """
    for name, kinds in fields.items():
        value = content.get(name)
        fits = value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))
        if not fits or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(
                f"{label}: field {name!r} is {str(value)[:60]!r}, not a {wanted}; fetch the file again"
            )


class Checkpoint:
    """The weights of a source, from one safetensors file or several; a tensor is read when it is asked for.

    Args:
        source: where the files are.
        headers: given for a model of which only the config is there: its tensors' dtypes and shapes.

    Attributes:
        source: where the files are.
        config: the model's config.json.
        headers: every tensor's dtype, shape and file, in file order.

    Raises:
        CheckpointError: a file is cut short or malformed, two files hold the same tensor, or the model is quantized.

    """

    def __init__(self, source: Source, headers: Mapping[str, TensorHeader] | None = None) -> None:
        self.source = source
        self.config: dict[str, Any] = source.json("config.json")
        check_fields(self.config, CONFIG_FIELDS, f"{source.spec!r}: config.json")
        self.headers: dict[str, TensorHeader] = dict(headers or {})
        self._streams: dict[str, StreamedFile] = {}
        if headers is not None:
            return
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"].get("quant_method", "an unnamed method")
            raise CheckpointError(
                f"{source.spec!r} is quantized ({method}): its integers are not weights that can be added. Use the "
                "repository it was quantized from, and quantize the merged model afterwards"
            )
        for filename in source.weight_files:
            for name, header in source.headers(filename).items():
                if name in self.headers:
                    raise CheckpointError(
                        f"{source.spec!r}: tensor {name!r} is in both {self.headers[name].file} and {filename}"
                    )
                self.headers[name] = header
        if not self.headers:
            raise CheckpointError(
                f"{source.spec!r} names no file that holds a weight; the upload or download is incomplete"
            )

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as it is stored.

        Raises:
            CheckpointError: the file cannot be read.

        """
        from safetensors import SafetensorError, safe_open

        filename = self.headers[name].file
        if filename in self._streams or self.source.is_streamed(filename):
            if filename not in self._streams:
                self._streams[filename] = StreamedFile(self.source, filename)
            return self._streams[filename].tensor(name)
        try:
            # Opened anew for each tensor, so that a file's pages are given back with the tensors read from it.
            with safe_open(self.source.path(filename), framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.source.spec!r}: {filename} cannot be read ({error}); fetch it again"
            ) from None

    def finish(self) -> None:
        """End a reading of all that is wanted: files that were read by range are checked against their hashes.

        Raises:
            SourceError: a file has other bytes than the Hub says.

        """
        for stream in self._streams.values():
            stream.finish()


class CheckpointWriter:
    """Writes safetensors shards of a layout known beforehand, tensor by tensor in `order`.

    A shard's header is written first and each tensor's bytes are appended as they come, so that memory holds one tensor
    and not one shard. Use as a context manager: leaving it without an error checks that everything was written.

    Args:
        folder: where the shards and the index go.
        layout: every tensor's name, dtype (as safetensors spells it) and shape.
        max_shard_bytes: a shard is closed before it would grow beyond this.
        metadata: text for every shard's header.
        stem: what the files' names begin with.

    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, TensorHeader],
        max_shard_bytes: float,
        metadata: Mapping[str, str],
        stem: str = "model",
    ) -> None:
        self._folder, self._layout = folder, dict(layout)
        self._metadata = {"format": "pt", **metadata}
        self._stem = stem
        self._shards = shard_layout(self._layout, max_shard_bytes)
        self._files = shard_names(len(self._shards), stem)
        self._pending = [(name, index) for index, shard in enumerate(self._shards) for name in shard]
        self._position = 0
        self._file: BinaryIO | None = None
        self._shard = -1

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._pending:  # a file without a tensor is a file, too
            self._begin(0)
        if self._file is not None:
            self._file.close()
        if kind is None:
            if self._position != len(self._pending):
                raise RuntimeError(f"only {self._position} of {len(self._pending)} tensors were written")
            self._write_index()

    @property
    def order(self) -> tuple[str, ...]:
        """The tensors in the order they must be written."""
        return tuple(name for name, _ in self._pending)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the shards."""
        return self._files

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the layout, cast to the layout's dtype."""
        expected, shard = self._pending[self._position]
        header = self._layout[expected]
        if name != expected or tuple(tensor.shape) != header.shape:
            raise RuntimeError(f"tensor {name!r} {tuple(tensor.shape)} where {expected!r} {header.shape} was due")
        if shard != self._shard:
            self._begin(shard)
        assert self._file is not None
        stored = tensor.detach().to("cpu", TORCH_DTYPES[header.dtype]).contiguous()
        self._file.write(stored.reshape(-1).view(torch.uint8).numpy().tobytes())
        self._position += 1

    def _begin(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, object] = {"__metadata__": self._metadata}
        offset = 0
        for name in self._shards[shard]:
            entry = self._layout[name]
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self._folder / self._files[shard]).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._shard = shard

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        total = sum(header.nbytes for header in self._layout.values())
        weight_map = {name: self._files[shard] for name, shard in self._pending}
        index = {"metadata": {"total_size": total, **self._metadata}, "weight_map": weight_map}
        name = f"{self._stem}.safetensors.index.json"
        (self._folder / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shard_layout(layout: Mapping[str, TensorHeader], max_shard_bytes: float) -> list[list[str]]:
    """Cut a layout into shards of at most `max_shard_bytes` (a larger tensor gets a shard of its own), in order.

    Inside a shard, tensors of wider dtypes come first, so that every tensor starts at a multiple of its entry's size.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, header in layout.items():
        if shards[-1] and used + header.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += header.nbytes
    return [sorted(shard, key=lambda name: -DTYPE_BYTES[layout[name].dtype]) for shard in shards]


def shard_names(count: int, stem: str = "model") -> tuple[str, ...]:
    """Return the file names that transformers expects for this number of shards."""
    if count == 1:
        return (f"{stem}.safetensors",)
    return tuple(f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))


def parse_size(text: str | int) -> int:
    """Return a number of bytes from a number or a text such as '5GB' or '500MB' (powers of ten).

    Raises:
        ValueError: it is not such a text.

    """
    if isinstance(text, int):
        return text
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)
