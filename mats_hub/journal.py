"""What an interrupted merge has finished, so that the same merge goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mats_hub.processes import agreed, is_first
from mats_hub.report import TensorRecord
from mats_hub.source import file_sha256

JOURNAL_FILE = "mats_progress.json"


class Journal:
    """The finished shards of a merge, kept beside them; of several processes the first one writes it.

    Args:
        folder: where the shards are.
        digest: of all that the merge depends on; what another merge has left there is not taken up.
        on_file: called with the path of every shard, finished now or in an earlier run.

    Attributes:
        files: sha256 of every finished shard.
        records: what happened to each tensor of the finished shards.
        notes: what else is not to be worked out again.

    """

    def __init__(self, folder: Path, digest: str = "", on_file: Callable[[Path], None] | None = None) -> None:
        self._folder, self._digest, self._on_file = folder, digest, on_file
        self.files: dict[str, str] = {}
        self.records: dict[str, TensorRecord] = {}
        self.notes: dict[str, Any] = {}
        if is_first():
            with suppress(OSError, ValueError, KeyError, TypeError):
                self._read(json.loads((folder / JOURNAL_FILE).read_text(encoding="utf-8")))
        self.files, self.records, self.notes = agreed((self.files, self.records, self.notes))
        for name in self.files:
            self._tell(folder / name)

    def _read(self, content: dict[str, Any]) -> None:
        if content["digest"] != self._digest:
            return
        self.files = {
            name: digest
            for name, digest in content["files"].items()
            if (self._folder / name).is_file() and file_sha256(self._folder / name) == digest
        }
        records = [TensorRecord.from_mapping(record) for record in content["records"]]
        self.records, self.notes = {record.key: record for record in records}, content["notes"]

    def clear(self) -> None:
        """Remove from the folder what is not finished, or is of another merge."""
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (*self.files, JOURNAL_FILE):
                path.unlink()

    def _tell(self, path: Path) -> None:
        if self._on_file and is_first():
            self._on_file(path)

    def note(self, name: str, value: Any) -> None:
        """Keep a value of which JSON can be made."""
        self.notes[name] = value
        self._write()

    def finished(self, path: Path, records: Iterable[TensorRecord]) -> None:
        """Keep that a shard is finished, and what happened to its tensors."""
        self.files[path.name] = file_sha256(path) if is_first() else ""
        self.records |= {record.key: record for record in records}
        self._write()
        self._tell(path)

    def _write(self) -> None:
        if not is_first():
            return
        content = {
            "digest": self._digest,
            "files": self.files,
            "records": [asdict(record) for record in self.records.values()],
            "notes": self.notes,
        }
        new = self._folder / f"{JOURNAL_FILE}.part"
        new.write_text(json.dumps(content), encoding="utf-8")
        os.replace(new, self._folder / JOURNAL_FILE)

    def remove(self) -> None:
        """Remove the journal from a folder that is complete."""
        (self._folder / JOURNAL_FILE).unlink(missing_ok=True)


def digest_of(parts: Iterable[Any]) -> str:
    """Return a hash of values of which JSON can be made."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()
