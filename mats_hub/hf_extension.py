"""``hf mats …``: this package as an extension of the Hub's own command line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from mats_hub.errors import OutputError

COMMAND = "hf-mats"
"""The console script that ``hf mats`` runs."""

ROOT = "~/.local/share/hf/extensions"
"""Where `huggingface_hub` looks for extensions (``huggingface_hub.cli.extensions.EXTENSIONS_ROOT``)."""


def program_name() -> str:
    """Return what this program was called as: ``hf mats`` from the Hub's command line, ``mats-hub`` otherwise."""
    return "hf mats" if Path(sys.argv[0]).stem == COMMAND else "mats-hub"


def register() -> Path:
    """Make ``hf mats`` run this installation, offline; return the manifest that was written.

    An extension of that name that ``hf extensions install`` put there is left alone.

    Raises:
        OutputError: the console script is missing, another extension is there, or the folder cannot be written.

    """
    beside = Path(sys.executable).parent / COMMAND
    script = str(beside) if beside.exists() else shutil.which(COMMAND)
    if script is None:
        raise OutputError(f"this installation has no {COMMAND}; install mats-hub with pip and run this again")
    folder = Path(ROOT).expanduser() / COMMAND
    if (folder / "venv").exists():
        raise OutputError(
            f"{str(folder)!r} holds an extension that hf installed; remove it first with 'hf extensions remove mats'"
        )
    content = {
        "owner": "mats-hub",
        "repo": COMMAND,
        "repo_id": f"mats-hub/{COMMAND}",
        "short_name": "mats",
        "executable_path": script,
        "type": "python",
        "installed_at": datetime.now(UTC).isoformat(),
        "description": "Merge fine-tuned models from the Hub (MaTS)",
        "commit_sha": None,
    }
    manifest = folder / "manifest.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".manifest.json.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, manifest)
    except OSError as error:
        raise OutputError(f"cannot write {str(manifest)!r}: {error.strerror or error}") from error
    return manifest
