"""What a merge looks like on the page: its problems, curves, figures, scores, card, and its answers."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import pandas as pd
from merge_jobs import AGREEMENT, Job

import mats_hub
from mats_hub import MergedModel

MAX_CURVES = 12


def problem_list(problems: list[str]) -> str:
    """Return problems, each with its way out, as a list."""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in problems)
    return f"<div role='alert' class='problems'><b>What stands in the way</b><ul>{items}</ul></div>" if items else ""


def curves_of(curves: dict[str, list[float]]) -> pd.DataFrame:
    """Return the residuals of the last solved tensors, as rows to plot."""
    shown = list(curves.items())[-MAX_CURVES:]
    rows = [
        (step, math.log10(max(residual, 1e-12)), key.removesuffix(".weight"))
        for key, residuals in shown
        for step, residual in enumerate(residuals)
        if step % max(len(residuals) // 40, 1) == 0
    ]
    return pd.DataFrame(rows, columns=["iteration", "log10 of the relative residual", "tensor"])


def pictures(job: Job, merged: MergedModel) -> list[tuple[str, str]]:
    """Return the figures of a merge, with words for each."""
    words = {
        "results": "Score of each model on each task",
        "convergence": "Relative residual of every solved weight",
        "movement": "How far each tensor moved",
    }
    shown = [(merged.folder / "figures" / f"{name}.png", text) for name, text in words.items()]
    shown.append((job.folder / AGREEMENT, "Where the experts agree, by layer"))
    return [(str(path), text) for path, text in shown if path.exists()]


def scores(merged: MergedModel) -> pd.DataFrame:
    """Return a row for each task and a column for each model."""
    rows = merged.report.results
    if not rows:
        return pd.DataFrame({"": ["no results: the page has no data of these experts' tasks"]})
    table = pd.DataFrame(rows).pivot_table(index="task", columns="model", values="value", sort=False).round(3)
    table.loc["mean"] = table.mean().round(3)
    return table.reset_index()


def worst(merged: MergedModel) -> pd.DataFrame:
    """Return the layers that are least converged."""
    solved = [record for record in merged.report.solved if record.residual is not None]
    solved.sort(key=lambda record: -(record.residual or 0.0))
    return pd.DataFrame(
        [(record.key, record.iterations, f"{record.residual:.2e}", record.outcome) for record in solved[:8]],
        columns=["weight", "steps", "relative residual", "how it ended"],
    )


def body_of(card: str) -> str:
    """Return a card without its front matter, and with words in place of figures that are beside it."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)
    return re.sub(r"!\[([^\]]*)\]\(figures/[^)]*\)", r"*Figure: \1.*", body)


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
