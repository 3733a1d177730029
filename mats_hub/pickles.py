"""Models that are stored as pickles only, made into safetensors once and on demand; nothing but tensors is read of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from mats_hub.errors import CheckpointError, OutputError
from mats_hub.source import WEIGHTS, Source, converted_folder, give_usual_mode, open_source
from mats_hub.tensor_header import TORCH_DTYPE_NAMES

INDEX = "pytorch_model.bin.index.json"
FOREIGN = frozenset(
    (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pb", ".pkl", ".pt", ".pth", ".tflite")
)
"""Suffixes of files that are not taken along: weights in other formats."""

STORABLE = frozenset(getattr(torch, name) for name in TORCH_DTYPE_NAMES.values())


def convert(model: str | Path, token: str | bool | None = None) -> Path:
    """Make safetensors of a model or adapter that is stored as pickles only, so that it can be merged.

    The pickles are read by torch's loader that builds tensors and runs no code of theirs (``weights_only``). Of a folder the
    safetensors are written beside them. Of a repository on the Hub they go into the Hub client's cache, for the commit its
    revision names now: who opens it on this machine by its id finds them.

    Args:
        model: a folder, or ``owner/name[/folder][@revision]``.
        token: Hub token; the one stored on this machine otherwise.

    Returns:
        The folder with the safetensors.

    Raises:
        SourceError: there is no such model.
        CheckpointError: it has no pickles, or has safetensors of its own; or a file is damaged, or holds more than tensors.
        OutputError: the safetensors cannot be written.

    """
    from safetensors import SafetensorError

    source = open_source(model, token)
    if source.repo_id and source.folder == converted_folder(source):
        return source.folder
    files = _pickles(source)
    target = converted_folder(source) if source.repo_id else source.folder
    assert target is not None
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=target) as temporary:
            stage = Path(temporary)
            names = _write(source, files, stage)
            if source.repo_id:
                names = [*_take_along(source, stage), *names]
            for name in names:  # the weights come last: until they are there, the model is opened as before
                give_usual_mode(stage / name)
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(stage / name, target / name)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write safetensors of {source.spec!r} to {str(target)!r}: {error}") from error
    return target


def _pickles(source: Source) -> dict[str, str]:
    """Return the pickles that hold the weights, and what each is called as safetensors."""
    adapter = "adapter_config.json" in source.sizes
    stem, single = ("adapter_model", "adapter_model.bin") if adapter else ("model", "pytorch_model.bin")
    if any(name in source.sizes for name in WEIGHTS):
        raise CheckpointError(f"{source.spec!r} is stored as safetensors already; there is nothing to convert")
    if single in source.sizes:
        return {single: f"{stem}.safetensors"}
    if adapter or INDEX not in source.sizes:
        held = ", ".join(sorted(source.sizes)[:10]) or "nothing"
        raise CheckpointError(f"{source.spec!r} has no {single}; it holds: {held}")
    files = sorted(set(source.weight_map(INDEX).values()))
    return {name: f"{name.removeprefix('pytorch_').removesuffix('.bin')}.safetensors" for name in files}


def _write(source: Source, files: Mapping[str, str], stage: Path) -> list[str]:
    """Write the tensors of each pickle to a file of its own, and an index if they are several; return their names."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for pickled, name in files.items():
        tensors = _read(source.path(pickled), f"{source.spec!r}: {pickled}")
        twice = sorted(weight_map.keys() & tensors)
        if twice:
            raise CheckpointError(f"{source.spec!r}: tensor {twice[0]!r} is in two files, {pickled} is the second")
        weight_map |= dict.fromkeys(tensors, name)
        save_file(_apart(tensors), stage / name, metadata={"format": "pt"})
    if any(name in WEIGHTS for name in files.values()):  # found by its name
        return list(files.values())
    missing = sorted(source.weight_map(INDEX).keys() - weight_map)
    if missing:
        raise CheckpointError(
            f"{source.spec!r}: no file holds tensor {missing[0]!r} of its index; fetch the model again"
        )
    index = "model.safetensors.index.json"
    (stage / index).write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n", encoding="utf-8"
    )
    return [*files.values(), index]


def _read(path: Path, label: str) -> dict[str, Tensor]:
    try:
        # What torch wrote before 1.6 is no archive, and is read whole.
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can end in anything
        why = " ".join(str(error).split())
        if "Weights only load failed" in why:
            raise CheckpointError(
                f"{label} holds more than tensors, which would have to run code to be opened; nothing of it was. Load it where "
                "you trust it, and store it again with model.save_pretrained(folder)"
            ) from None
        raise CheckpointError(f"{label} cannot be read ({type(error).__name__}: {why[:200]}); fetch it again") from None
    held = dict(content) if isinstance(content, Mapping) else {}
    for name, value in held.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in STORABLE
        if not isinstance(name, str) or not plain:
            raise CheckpointError(
                f"{label}: entry {name!r} is no tensor of a kind that is merged; it may be the checkpoint of a training. Load it "
                "into its model, and store that with model.save_pretrained(folder)"
            )
    if not held:
        raise CheckpointError(f"{label} holds no tensors by name; fetch it again")
    return held


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what safetensors cannot store: strides, and memory that several share (tied weights)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.detach().clone() if memory in seen else tensor.detach()
        found[name] = found[name].contiguous()
        seen.add(memory)
    return found


def _take_along(source: Source, stage: Path) -> list[str]:
    """Copy all of a repository but weights in other formats, and what is hidden; return the names."""
    paths = map(PurePosixPath, source.sizes)
    names = [
        str(path)
        for path in paths
        if path.suffix not in FOREIGN
        and not path.is_absolute()
        and not any(part.startswith(".") for part in path.parts)
    ]
    for name in names:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path(name), stage / name)
    return names
