"""Checkpoints: open one lazily, tensor by tensor, and write one shard by shard without ever holding a shard."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import nullcontext, suppress
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mats_hub.errors import CheckpointError
from mats_hub.source import Source
from mats_hub.streaming import StreamedFile
from mats_hub.tensor_header import DTYPE_BYTES, TORCH_DTYPE_NAMES, TensorHeader, tensor_offsets

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
        self._located: dict[str, tuple[str, dict[str, int]]] = {}
        if headers is not None:
            return
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"].get("quant_method", "an unnamed method")
            raise CheckpointError(
                f"{source.spec!r} is quantized ({method}): its integers are not weights that can be added. Use the "
                "repository it was quantized from (for adapters as the base, with --allow-other-base), and quantize the merged "
                "model afterwards"
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
        stream = self._stream(filename)
        if stream:
            return stream.tensor(name)
        try:
            # Opened anew for each tensor, so that a file's pages are given back with the tensors read from it.
            with safe_open(self.source.path(filename), framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.source.spec!r}: {filename} cannot be read ({error}); fetch it again"
            ) from None

    def _stream(self, filename: str) -> StreamedFile | None:
        if filename not in self._streams and self.source.is_streamed(filename):
            self._streams[filename] = StreamedFile(self.source, filename)
        return self._streams.get(filename)

    def part(self, name: str, start: int, stop: int, pinned: bool = False) -> Tensor:
        """Return the entries from `start` up to `stop` (excluded) of one tensor, flat, as it is stored.

        With `pinned`, what is read from a file lies in memory that a CUDA device can copy from by itself.

        Raises:
            CheckpointError: the file cannot be read.

        """
        header = self.headers[name]
        stream = self._stream(header.file)
        if stream:
            return stream.part(name, start, stop)
        if header.file not in self._located:
            path = self.source.path(header.file)
            self._located[header.file] = str(path), tensor_offsets(path)
        place, offsets = self._located[header.file]
        content = torch.empty(stop - start, dtype=TORCH_DTYPES[header.dtype], pin_memory=pinned)
        with FileIO(place) as file:
            file.seek(offsets[name] + start * content.itemsize)
            if file.readinto(content.view(torch.uint8).numpy().data) != content.nbytes:
                raise CheckpointError(f"{self.source.spec!r}: {header.file} is cut short; fetch it again")
        return content

    def streamed(self) -> dict[str, dict[str, str]]:
        """Return what was read by range: file → chunk's number → its hash."""
        return {filename: stream.chunks for filename, stream in self._streams.items()}

    def recall(self, chunks: Mapping[str, Mapping[str, str]]) -> None:
        """Tell what `streamed` returned in an earlier run, which has to be the same now."""
        for filename, known in chunks.items():
            if self.source.is_streamed(filename):
                self._streams[filename] = StreamedFile(self.source, filename, known)

    def finish(self) -> None:
        """End a reading of all that is wanted: files that were read by range are checked against their hashes.

        Raises:
            WrongBytes: a file has other bytes than the Hub says.

        """
        for stream in self._streams.values():
            stream.finish()


class CheckpointWriter:
    """Writes safetensors shards of a layout known beforehand, tensor by tensor.

    A shard begins with its header and every tensor's bytes go to their place as they come, in any order, so that memory
    holds one tensor and not one shard. Until it is complete a shard is called ``NAME.part``. Use as a context manager:
    leaving it without an error checks that everything was written.

    Args:
        folder: where the shards and the index go.
        layout: every tensor's name, dtype (as safetensors spells it) and shape.
        max_shard_bytes: a shard is closed before it would grow beyond this.
        metadata: text for every shard's header.
        stem: what the files' names begin with.
        there: shards that are complete from an earlier run.

    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, TensorHeader],
        max_shard_bytes: float,
        metadata: Mapping[str, str],
        stem: str = "model",
        there: Collection[str] = (),
    ) -> None:
        self._folder, self._layout = folder, dict(layout)
        self._metadata = {"format": "pt", **metadata}
        self._stem = stem
        shards = shard_layout(self._layout, max_shard_bytes)
        self._shards = dict(zip(shard_names(len(shards), stem), shards, strict=True))
        self.pending = {name: shard for name, shard in self._shards.items() if name not in there}
        """The shards that are to be written: file → tensors, in the order of the file."""
        self._places = {name: file for file, shard in self.pending.items() for name in shard}
        self._missing = {file: set(shard) for file, shard in self.pending.items()}
        self._open: dict[str, tuple[BinaryIO, dict[str, int]]] = {}
        self._lock = Lock()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            with suppress(OSError) if kind else nullcontext():
                self.close()

    def finish(self) -> None:
        """Check that everything was written, and write the index."""
        if not self._layout:  # a file without a tensor is a file, too
            self.begin(self.files[0])
            self.complete(self.files[0])
        missing = sum(len(shard) for shard in self._missing.values())
        if missing:
            raise RuntimeError(f"only {len(self._places) - missing} of {len(self._places)} tensors were written")
        self._write_index()

    def close(self) -> None:
        """Close files that are not complete."""
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    @property
    def order(self) -> tuple[str, ...]:
        """The tensors that are to be written, in the order of the files."""
        return tuple(self._places)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the shards."""
        return tuple(self._shards)

    def dtype(self, name: str) -> str:
        """Return the dtype a tensor is written in, as safetensors spells it."""
        return self._layout[name].dtype

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place, cast to the layout's dtype; the last one of a shard completes it."""
        file = self._places.get(name)
        if file is None or name not in self._missing[file] or tuple(tensor.shape) != self._layout[name].shape:
            raise RuntimeError(f"tensor {name!r} {tuple(tensor.shape)} is not of the layout, or was written before")
        self.put(name, tensor)
        with self._lock:
            self._missing[file].discard(name)
            complete = not self._missing[file]
        if complete:
            self.complete(file)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place, in a shard that another process may complete."""
        self.put_part(name, 0, tensor.reshape(-1))

    def put_part(self, name: str, start: int, tensor: Tensor) -> None:
        """Write flat entries of a tensor to their place, from entry `start` on, from any thread; see `put`."""
        file, header = self._places[name], self._layout[name]
        dtype = TORCH_DTYPES[header.dtype]
        stored = (tensor.to(dtype) if tensor.is_cuda else tensor).detach().to("cpu", dtype).contiguous()
        with self._lock:
            if file not in self._open:
                self.begin(file)
            opened, offsets = self._open[file]
            opened.seek(offsets[name] + start * DTYPE_BYTES[header.dtype])
            opened.write(stored.view(torch.uint8).numpy().data)

    def begin(self, file: str, create: bool = True) -> None:
        """Open a shard, and write its header unless another process has done so."""
        header: dict[str, object] = {"__metadata__": self._metadata}
        offset = 0
        for name in self._shards[file]:
            entry = self._layout[name]
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        offsets, place = {}, 8 + len(text)
        for name in self._shards[file]:
            offsets[name] = place
            place += self._layout[name].nbytes
        opened = (self._folder / f"{file}.part").open("w+b" if create else "r+b")
        self._open[file] = (opened, offsets)
        if create:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(place)
            opened.flush()

    def release(self, file: str) -> None:
        """Close a shard that another process completes."""
        if file in self._open:
            self._open.pop(file)[0].close()
        self._missing[file].clear()

    def complete(self, file: str) -> None:
        """Close a shard all of whose tensors were written, and give it its name."""
        self.release(file)
        os.replace(self._folder / f"{file}.part", self._folder / file)

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        total = sum(header.nbytes for header in self._layout.values())
        weight_map = {name: file for file, shard in self._shards.items() for name in shard}
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
