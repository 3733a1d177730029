"""Output folders: they appear complete or not at all, and an interrupted merge goes on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mats_hub.errors import OutputError, WrongBytes
from mats_hub.journal import JOURNAL_FILE
from mats_hub.processes import is_first, wait
from mats_hub.source import give_usual_mode


def check_output(folder: str | Path) -> Path:
    """Return the output folder after checking that it does not exist or is empty.

    Raises:
        OutputError: it holds something, or is a file.

    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(
            f"the output {str(folder)!r} exists and is not an empty folder; name another one or empty it first"
        )
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to write into; it becomes `target` when the block ends well, and is removed otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside {str(target)!r}: {error.strerror}") from error
    try:
        yield stage
        give_usual_mode(stage)
        if target.exists():
            target.rmdir()
        os.replace(stage, target)
    except OSError as error:
        raise OutputError(f"cannot write {str(target)!r}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def resumable(target: Path) -> Iterator[Path]:
    """Give the folder ``.NAME.partial`` beside `target` to write into; it becomes `target` when the block ends well.

    Otherwise it is removed, unless a journal in it tells of finished files. Of several processes the first one moves it.

    Raises:
        OutputError: it cannot be written, or another merge is writing it.

    """
    stage = target.parent / f".{target.name}.partial"
    lock = FileLock(target.parent / f".{target.name}.lock", blocking=False)
    try:
        if is_first():
            stage.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        wait()
    except Timeout:
        raise OutputError(f"another process is writing {str(target)!r}; wait for it, or name another output") from None
    except OSError as error:
        raise OutputError(f"cannot write beside {str(target)!r}: {error.strerror}") from error
    try:
        yield stage
        wait()
        if is_first():
            give_usual_mode(stage)
            if target.exists():
                target.rmdir()
            os.replace(stage, target)
        wait()
    except BaseException as error:
        kept = ""
        if (stage / JOURNAL_FILE).is_file() and not isinstance(error, WrongBytes):
            kept = f"What is finished is kept in {str(stage)!r}: the same merge, run again, goes on from there"
            error.add_note(kept)
        else:
            shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            why = f"cannot write {str(target)!r}: {error.strerror or error}; nothing was left there"
            raise OutputError(f"{why}. {kept}" if kept else why) from error
        raise
    finally:
        lock.release()
        if is_first():
            Path(lock.lock_file).unlink(missing_ok=True)
