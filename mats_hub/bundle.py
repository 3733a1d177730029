"""Several experts in one repository: a base that is named, one multi-task vector, and a mask of it for each task."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.checkpoint import Checkpoint, CheckpointWriter, check_fields
from mats_hub.errors import CheckpointError, IncompatibleExperts, SourceError, unknown
from mats_hub.localize import unpack
from mats_hub.source import Source, file_sha256, open_source
from mats_hub.tensor_header import TensorHeader

BUNDLE_FILE = "mats_bundle.json"
VECTOR_STEM = "multi_task_vector"
MASK_FILE = "mask.bin"
FIELDS: dict[str, tuple[type, ...]] = {"base": (dict,), "names": (list,), "tasks": (dict,), "vector": (dict,)}


class Bundle:
    """A compressed set of experts, opened lazily: a task's expert is the base plus its mask times the multi-task vector.

    Args:
        source: the repository or folder.
        base: its base, when that is not the one it names (a mirror, or a folder).

    Raises:
        CheckpointError: it is not well-formed.
        IncompatibleExperts: the base has other weights than the one it was made on.

    """

    def __init__(self, source: Source, base: str | Path | None = None) -> None:
        self.source, self.content = source, source.json(BUNDLE_FILE)
        check_fields(self.content, FIELDS, f"{source.spec!r}: {BUNDLE_FILE}")
        if not all(self.content.get(name) for name in FIELDS):
            raise CheckpointError(f"{source.spec!r}: {BUNDLE_FILE} is not complete; fetch it again")
        facts = self.content["base"]
        try:
            self.base = open_source(base or facts["model"], source.token)
        except (SourceError, KeyError) as error:
            raise SourceError(f"the base of {source.spec!r} cannot be opened; name it with 'base'. {error}") from None
        if facts.get("fingerprint") and self.base.fingerprint != facts["fingerprint"]:
            raise IncompatibleExperts(
                f"{source.spec!r} was made on a base with fingerprint {str(facts['fingerprint'])[:12]}, but {self.base.spec!r} "
                f"has {self.base.fingerprint[:12]}; name the right one with 'base'"
            )

    def check_task(self, task: str | None) -> str:
        """Return the task, or raise `SourceError` naming those there are."""
        if task is None or task not in self.content["tasks"]:
            said = (
                unknown("task", task, self.content["tasks"])
                if task
                else f"name a task: {', '.join(self.content['tasks'])}"
            )
            raise SourceError(f"{self.source.spec!r}: {said}")
        return task

    def mask(self, task: str) -> Tensor:
        """Return a task's mask over all entries, ``[n]`` bool.

        Raises:
            CheckpointError: its file is damaged.

        """
        facts, path = self.content["tasks"][task], self.source.path(f"tasks/{task}/{MASK_FILE}")
        wrong = f"{self.source.spec!r}: the mask of task {task!r} is damaged; fetch it again"
        if file_sha256(path) != facts["sha256"]:
            raise CheckpointError(wrong)
        try:
            content = path.read_bytes()
            content = zlib.decompress(content) if facts["encoding"] == "zlib" else content
            return unpack(torch.frombuffer(bytearray(content), dtype=torch.uint8), facts["count"])
        except (zlib.error, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{wrong} ({error})") from None

    def vector(self) -> Checkpoint:
        """Return the multi-task vector as a checkpoint of its own.

        Raises:
            CheckpointError: a file of it is not the one that the masks are of.

        """
        headers: dict[str, TensorHeader] = {}
        for name, digest in self.content["vector"].items():
            if file_sha256(self.source.path(name)) != digest:
                raise CheckpointError(f"{self.source.spec!r}: {name} is damaged; fetch it again")
            headers |= self.source.headers(name)
        return Checkpoint(self.source, headers)

    def expand(self, task: str, folder: Path) -> None:
        """Write a task's expert into a folder, as a merged model of one task: tensor by tensor."""
        mask, vector, base = self.mask(self.check_task(task)), self.vector(), Checkpoint(self.base)
        places, start = {}, 0
        for name in self.content["names"]:
            if name not in vector.headers or name not in base.headers:
                raise CheckpointError(
                    f"{self.source.spec!r}: tensor {name!r} is not in the base and the vector; wrong base?"
                )
            places[name] = start
            start += vector.headers[name].numel
        if start != len(mask):
            raise CheckpointError(
                f"{self.source.spec!r}: the mask of {task!r} has {len(mask)} entries, the vector {start}"
            )
        kept = self.content.get("left_out") or ()
        layout = {name: header for name, header in base.headers.items() if name not in kept}
        with CheckpointWriter(folder, layout, 5e9, {}) as writer:
            for name in writer.order:
                tensor = base.tensor(name)
                if name in places:
                    change = vector.tensor(name).float()
                    used = mask[places[name] : places[name] + change.numel()].reshape(change.shape)
                    tensor = (tensor.float() + torch.where(used, change, 0)).to(tensor.dtype)
                writer.write(name, tensor)
        for name in self.source.sizes:
            shared = "/" not in name and name.endswith((".json", ".txt", ".model", ".jinja"))
            if (shared and name != BUNDLE_FILE) or (name.startswith(f"tasks/{task}/") and not name.endswith(MASK_FILE)):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.source.path(name).read_bytes())


def write_bundle_file(folder: Path, content: dict[str, Any]) -> None:
    """Write what a bundle is made of."""
    (folder / BUNDLE_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
