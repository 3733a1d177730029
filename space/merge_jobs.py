"""Merges in the background: one at a time, found again by their id, really cancelled, and cleaned up after a while."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mats_hub
from mats_hub import MatsError, MergedModel, Plan, Recipe, demo

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")
EXAMPLE = "example/"
"""What the ids of the example's experts begin with; they are trained here, not fetched."""

KEEP_SECONDS = 3600.0
MAX_WAITING = 8
FREE_SHARE = 0.8
"""Of what is free of memory and disk: a merge that needs more is not begun."""


class Cancelled(Exception):
    """The visitor asked for a merge to stop."""


@dataclass
class Job:
    """One merge.

    Attributes:
        recipe: what is merged.
        token: the visitor's, for his private models.
        state: waiting, running, done, failed or cancelled.
        step: what is being done.
        done: items of the step that are done.
        total: items of the step.
        curves: tensor → relative residuals, in the order they were solved.
        error: what went wrong, for the visitor.
        merged: the result.
        ended: when it ended.

    """

    recipe: Recipe
    token: str | bool | None = field(default=None, repr=False)
    state: str = "waiting"
    step: str = ""
    done: int = 0
    total: int = 0
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    error: str = ""
    merged: MergedModel | None = None
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    def progress(self, items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        """Count what is done of a step, and stop where the visitor asked for it."""
        self.step, self.done, self.total = description, 0, total
        for item in items:
            if self.stop.is_set():
                raise Cancelled
            yield item
            self.done += 1

    def watch(self, record: Any) -> None:
        """Keep the residuals of a tensor that was just solved."""
        if record.residuals:
            self.curves[record.key] = record.residuals


class Jobs:
    """All merges of this server; one runs, the others wait."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="merge")

    def start(self, recipe: Recipe, token: str | bool | None, after: Callable[[Job], None] | None = None) -> str:
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
            name, job = secrets.token_urlsafe(16), Job(recipe, token)
            self._jobs[name] = job
        self._worker.submit(self._run, job, after)
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
            job.stop.set()

    def _run(self, job: Job, after: Callable[[Job], None] | None) -> None:
        if job.stop.is_set():
            self._end(job, "cancelled")
            return
        job.state = "running"
        try:
            merged = mats_hub.merge(job.recipe, token=job.token, progress=job.progress, watch=job.watch)
            job.merged = merged
            if after:
                after(job)
            self._end(job, "done")
        except Cancelled:
            job.merged = None
            self._end(job, "cancelled")
        except MatsError as error:
            self._end(job, "failed", str(error))
        except Exception as error:  # nobody would see it in a thread
            self._end(job, "failed", f"Something unexpected went wrong ({type(error).__name__}); please report it.")
            raise

    def _end(self, job: Job, state: str, error: str = "") -> None:
        job.error, job.ended, job.state = error, time.monotonic(), state

    def _clean(self) -> None:
        old = time.monotonic() - KEEP_SECONDS
        for name in [name for name, job in self._jobs.items() if job.over and job.ended < old]:
            del self._jobs[name]  # its folder goes with the merged model


class Example:
    """The experts of the example: trained here once, so that the page works without a network."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self.data: dict[str, dict[str, Any]] = {}

    @property
    def ids(self) -> list[str]:
        """The experts' ids."""
        return [f"{EXAMPLE}{name}" for name in demo.TASKS]

    def prepare(self, progress: Callable[..., Iterable[Any]]) -> None:
        """Train the base and the experts, unless that is done."""
        with self._lock:
            if self._folder is None:
                folder = Path(tempfile.mkdtemp(prefix="mats-example-"))
                try:
                    self.data = demo.make_experts(folder, "auto", progress)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                self._folder = folder

    def path(self, name: str) -> str:
        """Return where an expert of the example is."""
        assert self._folder is not None
        task = name.removeprefix(EXAMPLE)
        return str(self._folder / ("base" if task == "base" else f"experts/{task}"))

    def evaluate(self, job: Job) -> None:
        """Score the experts, their average and the merged model on the example's test data."""
        assert job.merged is not None
        processor = self.path(f"{EXAMPLE}base")
        average = mats_hub.merge([self.path(name) for name in self.ids], base=processor, method="average")
        models = {
            "expert": lambda task: mats_hub.load(self.path(f"{EXAMPLE}{task}")),
            "average": average.load,
            "merged": job.merged.load,
        }
        pairs = [(task, name) for name in models for task in demo.TASKS]
        job.merged.add_results(
            [
                {
                    "task": task,
                    "metric": "accuracy",
                    "model": name,
                    "dataset": f"digits, {task}",
                    "value": mats_hub.evaluate(
                        models[name](task), dataset=self.data[task]["test"], processor=processor
                    ),
                }
                for task, name in job.progress(pairs, len(pairs), "measuring on test data")
            ]
        )


def check_ids(recipe: Recipe, example: Example) -> Recipe:
    """Return the recipe with the example's ids replaced by where it is, after refusing whatever is no Hub id.

    Raises:
        ValueError: something in it is a path, a URL, or no id at all.

    """

    def checked(name: str | None, what: str) -> str | None:
        if name is None:
            return None
        if name in (*example.ids, f"{EXAMPLE}base"):
            return example.path(name)
        if not HUB_ID.fullmatch(name) or ".." in name or Path(name).exists():
            raise ValueError(f"{what} {name[:80]!r} is no Hub id; write owner/name or owner/name@revision")
        return name

    experts = [
        entry.model_copy(
            update={
                "model": checked(entry.model, "the expert"),
                "name": entry.name or entry.model.partition("@")[0].rsplit("/", 1)[-1],
                "statistics": checked(entry.statistics, "the statistics"),
            }
        )
        for entry in recipe.experts
    ]
    changes = {"experts": tuple(experts), "base": checked(recipe.base, "the base")}
    return recipe.model_copy(update={**changes, "tokenizer": checked(recipe.tokenizer, "the tokenizer")})


def what_does_not_fit(plan: Plan) -> list[str]:
    """Return what this machine has too little of for a merge, with what helps."""
    return [str(problem) for problem in plan.shortages(Path(tempfile.gettempdir()), FREE_SHARE)]


def answers(job: Job, given: Any) -> list[list[str]]:
    """Return a row for each task: what the merged model says to a text or an image, and what the task's expert says."""
    from transformers import AutoImageProcessor, AutoTokenizer

    assert job.merged is not None
    folder = job.merged.folder
    if isinstance(given, str):
        inputs = AutoTokenizer.from_pretrained(folder)(given, return_tensors="pt", truncation=True)
    else:
        inputs = AutoImageProcessor.from_pretrained(folder)(given.convert("RGB"), return_tensors="pt")
    return [
        [
            entry.name or "",
            *answer(job.merged.load(entry.name), inputs),
            *answer(mats_hub.load(entry.model, token=job.token), inputs),
        ]
        for entry in job.recipe.experts
    ]


def answer(model: Any, inputs: Any) -> tuple[str, str]:
    """Return the label that a model gives to an input, and its probability in words."""
    import torch

    with torch.no_grad():
        logits = model(**inputs).logits
    if logits.dim() != 2:
        raise ValueError("only models that classify can be tried here; load it with the lines on its card")
    chances = logits[0].softmax(-1)
    best = int(chances.argmax())
    return str(model.config.id2label[best]), f"{float(chances[best]):.0%}"
