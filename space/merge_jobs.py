"""Merges in the background: one at a time, found again by their id, really cancelled, and cleaned up after a while."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from example_experts import Example

import mats_hub
from mats_hub import MatsError, MergedModel, Plan, Recipe
from mats_hub.conflict import by_layer, draw

AGREEMENT = "agreement.png"
KEEP_SECONDS = 3600.0
MAX_WAITING = 8
WRITTEN_EVERY = 0.2
MOST_GPU_SECONDS = 120
DISK_SHARE = 0.3
"""Of the disk, that what is kept of all merges may take."""
FREE_SHARE = 0.8
"""Of what is free of memory and disk: a merge that needs more is not begun."""


class Cancelled(Exception):
    """The visitor asked for a merge to stop."""


class ProgressFile:
    """Where a step is, in a file that whoever runs it writes and whoever shows it reads; and a mark to stop it.

    The two may be different processes: on ZeroGPU what needs the GPU runs in a process of its own.

    Args:
        folder: where the file is.

    """

    def __init__(self, folder: Path) -> None:
        self._file, self._stop = folder / "progress.json", folder / "stop"
        self._content: dict[str, Any] = {"step": "", "done": 0, "total": 0, "curves": {}}
        self._written = 0.0

    def steps(self, items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        """Count what is done of a step, and stop where the visitor asked for it."""
        self._content |= {"step": description, "done": 0, "total": total}
        self._write()
        for item in items:
            if self._stop.exists():
                raise Cancelled
            yield item
            self._content["done"] += 1
            if time.monotonic() > self._written + WRITTEN_EVERY:
                self._write()

    def watch(self, record: Any) -> None:
        """Keep the residuals of a tensor that was just solved."""
        if record.residuals:
            self._content["curves"][record.key] = record.residuals

    def read(self) -> dict[str, Any]:
        """Return the step, how many items of it are done and how many there are, and residuals by tensor."""
        with suppress(OSError, ValueError):
            return json.loads(self._file.read_text(encoding="utf-8"))
        return dict(self._content)

    def stop(self) -> None:
        """Ask for the step to stop."""
        self._stop.touch()

    def _write(self) -> None:
        write_json(self._file, self._content)
        self._written = time.monotonic()


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)


@dataclass
class Job:
    """One merge, in a folder of its own.

    Attributes:
        name: its id, which nobody can guess.
        folder: where its files are.
        recipe: what is merged.
        token: the visitor's, for private models; it is on no disk.
        is_example: whether the experts are the example's.
        state: waiting, running, done, failed or cancelled.
        error: what went wrong, for the visitor.
        began: when it was asked for, in seconds since 1970.
        ended: when it ended.

    """

    name: str
    folder: Path
    recipe: Recipe
    token: str | bool | None = field(default=None, repr=False)
    is_example: bool = False
    state: str = "waiting"
    error: str = ""
    began: float = field(default_factory=time.time)
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.progress_file = ProgressFile(self.folder)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def output(self) -> Path:
        """Where the merged model is."""
        return self.folder / "merged"

    @property
    def merged(self) -> MergedModel | None:
        """The result, once it is there."""
        return MergedModel.open(self.output) if self.state == "done" and self.output.exists() else None

    @property
    def progress(self) -> Callable[[Iterable[Any], int, str], Iterator[Any]]:
        """What wraps the items of a step, so that they are counted and can be stopped."""
        return self.progress_file.steps

    def save(self) -> None:
        """Write what is known of it, but the token."""
        content = {name: getattr(self, name) for name in ("is_example", "state", "error", "began", "ended")}
        content |= {"recipe": self.recipe.to_yaml(), "private": isinstance(self.token, str)}
        write_json(self.folder / "job.json", content)

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read one that an earlier page began; one that it did not end is waiting, or has failed where it cannot go on.

        Raises:
            OSError, ValueError, KeyError: there is none.

        """
        content = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        recipe, private = Recipe.from_yaml(content.pop("recipe")), content.pop("private")
        job = cls(folder.name, folder, recipe, False, **content)
        if not job.over:
            job.state = "waiting"
            if private or job.is_example:
                job.state, job.ended = "failed", time.time()
                job.error = "The page was restarted in the middle of this merge. Begin it again from its recipe."
        return job


def merge_there(recipe: str, folder: str, token: str | bool | None) -> None:
    """Merge a recipe into ``merged`` in a job's folder, and draw where its experts agree."""
    progress, output = ProgressFile(Path(folder)), Path(folder, "merged")
    mats_hub.merge(Recipe.from_yaml(recipe), output=output, token=token, progress=progress.steps, watch=progress.watch)
    with suppress(MatsError):  # without a base there are no task vectors
        found = mats_hub.agreement(Recipe.from_yaml(recipe), token=token, progress=progress.steps)
        draw(by_layer(found), Path(folder, AGREEMENT))


def gpu_seconds(recipe: str, folder: str, token: str | bool | None) -> int:
    """Return how long a merge may hold a GPU of ZeroGPU, from what its plan has to read and to solve."""
    try:
        plan = mats_hub.make_plan(Recipe.from_yaml(recipe), token)
    except MatsError:
        return 30  # it will say so at once
    gigabytes = (plan.bytes_to_fetch + 2 * plan.disk_bytes) / 1e9
    return min(MOST_GPU_SECONDS, 20 + int(4 * gigabytes) + len(plan.merged_entries) // 20)


try:  # there on Spaces; without a GPU that is lent by the call it changes nothing
    from spaces import GPU

    merge_there = GPU(duration=gpu_seconds)(merge_there)
except ModuleNotFoundError:
    pass


class Jobs:
    """All merges of this server; one runs, the others wait. Those of an earlier page are found again.

    Args:
        root: where their folders are; ``MATS_JOBS``, or beside the Hub's cache.
        example: what scores the example's merges.

    """

    def __init__(self, root: Path | None = None, example: Example | None = None) -> None:
        self.root, self._example = root or default_root(), example
        self.root.mkdir(parents=True, exist_ok=True)
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="merge")
        for folder in sorted(self.root.iterdir()):
            with suppress(OSError, ValueError, KeyError, MatsError):
                self._jobs[folder.name] = Job.load(folder)
        for job in sorted(self._jobs.values(), key=lambda job: job.began):
            if not job.over:
                self._worker.submit(self._run, job, None)

    def start(
        self,
        recipe: Recipe,
        token: str | bool | None,
        after: Callable[[Job], None] | None = None,
        is_example: bool = False,
    ) -> str:
        """Queue a merge and return its id, which nobody can guess.

        Raises:
            RuntimeError: too many wait already.

        """
        with self._lock:
            self._clean()
            if sum(not job.over for job in self._jobs.values()) > MAX_WAITING:
                raise RuntimeError(
                    "Too many merges are waiting. Try again in some minutes, or merge on your own machine."
                )
            name = secrets.token_urlsafe(16)
            folder = self.root / name
            folder.mkdir()
            job = self._jobs[name] = Job(name, folder, recipe, token, is_example)
            job.save()
        # ZeroGPU tells whose quota it is by the visitor's context.
        self._worker.submit(copy_context().run, self._run, job, after)
        return name

    def get(self, name: str | None) -> Job | None:
        """Return a merge; None where there is none of this id any more."""
        return self._jobs.get(name or "")

    def ahead(self, job: Job) -> int:
        """Return how many merges are done before this one."""
        return sum(not other.over and other.began < job.began for other in list(self._jobs.values()))

    def cancel(self, name: str | None) -> None:
        """Stop a merge; nothing of it is kept."""
        job = self.get(name)
        if job is not None and not job.over:
            job.progress_file.stop()

    def _run(self, job: Job, after: Callable[[Job], None] | None) -> None:
        job.state = "running"
        job.save()
        try:
            for _ in job.progress((None,), 1, "beginning"):
                merge_there(job.recipe.to_yaml(), str(job.folder), job.token)
            if job.is_example and self._example:
                self._example.evaluate(MergedModel.open(job.output), job.progress)
            if after:
                after(job)
            self._end(job, "done")
        except Cancelled:
            self._end(job, "cancelled")
        except MatsError as error:
            self._end(job, "failed", str(error))
        except Exception as error:  # nobody would see it in a thread
            self._end(job, "failed", f"Something unexpected went wrong ({type(error).__name__}); please report it.")
            raise

    def _end(self, job: Job, state: str, error: str = "") -> None:
        if state != "done":  # of what did not come to an end nothing is kept
            for path in job.folder.glob("*merged*"):
                shutil.rmtree(path, ignore_errors=True)
        job.error, job.ended, job.state, job.token = error, time.time(), state, job.token if state == "done" else None
        job.save()

    def _clean(self) -> None:
        """Remove what is old, and the oldest while all together take too much of the disk."""
        over = sorted((job for job in self._jobs.values() if job.over), key=lambda job: job.ended)
        sizes = {job.name: sum(f.stat().st_size for f in job.folder.rglob("*") if f.is_file()) for job in over}
        room = DISK_SHARE * (shutil.disk_usage(self.root).free + sum(sizes.values()))
        for job in over:
            if job.ended < time.time() - KEEP_SECONDS or sum(sizes.values()) > room:
                shutil.rmtree(job.folder, ignore_errors=True)
                del self._jobs[job.name], sizes[job.name]


def default_root() -> Path:
    """Return where jobs are kept: ``MATS_JOBS``, or beside the Hub's cache."""
    from huggingface_hub import constants

    return Path(os.environ.get("MATS_JOBS") or Path(constants.HF_HOME, "mats_hub", "jobs"))


def what_does_not_fit(plan: Plan) -> list[str]:
    """Return what this machine has too little of for a merge, with what helps."""
    return [str(problem) for problem in plan.shortages(Path(tempfile.gettempdir()), FREE_SHARE)]
