"""Reading a safetensors file on the Hub by HTTP range: nothing is kept on disk, and every byte is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from mats_hub.errors import CheckpointError, WrongBytes
from mats_hub.source import Source
from mats_hub.tensor_header import DTYPE_BYTES, TORCH_DTYPE_NAMES, check_header

CHUNK_BYTES = 4 * 2**20
"""What one request asks for."""

AHEAD = 4
"""How many chunks of a file are fetched before they are asked for."""

CONNECTIONS = 8
"""How many requests run at a time, of all files together."""


class StreamedFile:
    """A safetensors file of a Hub repository, whose tensors are fetched when they are asked for and then forgotten.

    The file is cut into chunks; `AHEAD` of them are fetched beyond the one that is read. Memory holds these and the tensor
    that is put together. The chunks go through sha256 in the file's order: those that nobody asks for are fetched by
    `finish`, for the hash alone. A chunk that is read again has to be what it was.

    Args:
        source: the repository; its commit, token and hashes are used.
        filename: the file in it.
        chunks: what an earlier run has read: a chunk's number → its hash.

    Attributes:
        chunks: what was read: a chunk's number → its hash.

    """

    def __init__(self, source: Source, filename: str, chunks: Mapping[str, str] | None = None) -> None:
        self._source, self._filename = source, filename
        self.chunks = dict(chunks or {})
        self._size, self._chunk = source.sizes[filename], CHUNK_BYTES
        self._count = -(-self._size // self._chunk)
        self._fetched: dict[int, Future[bytes]] = {}
        self._last, self._checked = -1, b""
        self._hash, self._hashed = hashlib.sha256(), 0
        length = int.from_bytes(self._read(0, 8), "little")
        label = f"{source.spec!r}: {filename}"
        if not 2 <= length <= min(self._size - 8, 100_000_000):
            raise CheckpointError(f"{label} is not a safetensors file; fetch the model again from a trusted place")
        try:
            raw = json.loads(bytes(self._read(8, 8 + length)))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{label} has a malformed safetensors header") from None
        raw.pop("__metadata__", None)
        self._headers = check_header(raw, self._size - 8 - length, source.spec, filename)
        self._offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in raw.items()}

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as it is stored.

        Raises:
            SourceError: it cannot be fetched.
            WrongBytes: the file is read through and has other bytes than the Hub says.

        """
        header = self._headers[name]
        return self.part(name, 0, header.numel).reshape(header.shape)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries from `start` up to `stop` (excluded) of one tensor, flat, as it is stored; see `tensor`."""
        dtype = getattr(torch, TORCH_DTYPE_NAMES[self._headers[name].dtype])
        width, begin = DTYPE_BYTES[self._headers[name].dtype], self._offsets[name]
        content = self._read(begin + start * width, begin + stop * width)
        return torch.frombuffer(content, dtype=torch.uint8).view(dtype) if content else torch.empty(0, dtype=dtype)

    def finish(self) -> None:
        """Fetch what was not asked for, and check the file's hash.

        Raises:
            WrongBytes: the file has other bytes than the Hub says.

        """
        if self._source.digests.get(self._filename):
            for index in range(self._hashed, self._count):
                self._take(index)

    def _read(self, begin: int, end: int) -> bytearray:
        content = bytearray(end - begin)
        for index in range(begin // self._chunk, -(-end // self._chunk)):
            start = index * self._chunk
            first, last = max(begin, start), min(end, start + self._chunk)
            content[first - begin : last - begin] = memoryview(self._take(index))[first - start : last - start]
        return content

    def _take(self, index: int) -> bytes:
        """Return a chunk, and have the next ones fetched where the file is being read from front to back."""
        ahead = AHEAD if index - self._last in (0, 1) else 0
        wanted = range(index, min(index + ahead + 1, self._count))
        for other in [number for number in self._fetched if number not in wanted]:
            self._fetched.pop(other).cancel()
        for number in wanted:
            if number not in self._fetched:
                end = min((number + 1) * self._chunk, self._size)
                self._fetched[number] = _workers().submit(
                    self._source.read_range, self._filename, number * self._chunk, end
                )
        chunk = self._fetched[index].result()
        if chunk is not self._checked:
            digest = hashlib.sha256(chunk).hexdigest()[:32]
            if self.chunks.setdefault(str(index), digest) != digest:
                raise self._wrong("came with other bytes than the first time")
        self._last, self._checked = index, chunk
        if index == self._hashed:
            self._hash.update(chunk)
            self._hashed += 1
            if self._hashed == self._count:
                self._check()
                self._fetched.clear()
        return chunk

    def _check(self) -> None:
        digest = self._source.digests.get(self._filename)
        if digest and digest != self._hash.hexdigest():
            raise self._wrong("came with other bytes than the Hub says it has")

    def _wrong(self, what: str) -> WrongBytes:
        return WrongBytes(
            f"{self._source.spec!r}: {self._filename} {what}; nothing that was made of it is kept. Try again, or without --stream"
        )


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")
