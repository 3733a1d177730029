"""Scores of a model on a task's examples: accuracy, F1, loss, perplexity."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import nn

from mats_hub.device import memory_errors
from mats_hub.errors import RecipeError, StatisticsError, unknown
from mats_hub.statistics.collect import IGNORED
from mats_hub.statistics.task_data import TaskData

Metric = Literal["accuracy", "f1", "loss", "perplexity"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LOWER_IS_BETTER = ("loss", "perplexity")


@memory_errors("scoring a model", "Take smaller batches (batch_size), or cut texts shorter (max_length)")
def score(
    data: TaskData, model: nn.Module, metric: str = "accuracy", batch_size: int = 64, device: torch.device | str = "cpu"
) -> float:
    """Return a model's score on a task's examples.

    accuracy: share of labels (of tokens, for language models), in [0, 1]. f1: of label 1 where there are two, the mean over
    the labels that occur otherwise. loss: mean over the examples of the model's own loss. perplexity: exp of the mean negative
    log-likelihood of a token.

    Raises:
        RecipeError: the metric is unknown.
        StatisticsError: the metric is not one of this kind of task.
        ResourceError: memory ran out.

    """
    if metric not in METRICS:
        raise RecipeError(unknown("metric", metric, METRICS))
    if data.task.name == "feature-extraction":
        raise StatisticsError(f"a {type(model).__name__} predicts nothing that could be scored")
    if metric == "accuracy":
        return data.accuracy(model, batch_size, device)
    if metric == "perplexity" and not data.task.per_token:
        raise StatisticsError(f"perplexity is of tokens, and {data.task.name} predicts none; use accuracy, f1 or loss")
    model.eval()
    with torch.no_grad():
        if metric == "f1":
            return _f1(data, model, batch_size, device)
        if metric == "loss":
            return _mean_loss(data, model, batch_size, device)
        return _perplexity(data, model, batch_size, device)


def relative(value: float, reference: float, metric: str) -> float:
    """Return how good a score is in units of a reference's: merged ÷ expert, or its inverse where lower is better."""
    better, worse = (reference, value) if metric in LOWER_IS_BETTER else (value, reference)
    return better / worse if worse else math.nan


def _mean_loss(data: TaskData, model: nn.Module, batch_size: int, device: torch.device | str) -> float:
    total, count = 0.0, 0
    for batch in data.batches(batch_size, device):
        total += float(data.loss(model, batch))
        count += len(batch["labels"])
    return total / max(count, 1)


def _perplexity(data: TaskData, model: nn.Module, batch_size: int, device: torch.device | str) -> float:
    total, count = 0.0, 0
    for batch in data.batches(batch_size, device):
        logits, labels = data.shifted(data.logits(model, batch), batch["labels"])
        flat = logits.float().flatten(0, 1), labels.flatten()
        total += float(nn.functional.cross_entropy(*flat, reduction="sum", ignore_index=IGNORED))
        count += int((labels != IGNORED).sum())
    return math.exp(total / max(count, 1))


def _f1(data: TaskData, model: nn.Module, batch_size: int, device: torch.device | str) -> float:
    several = not data.classes and data.config.problem_type == "multi_label_classification"
    pairs: list[Any] = []
    for batch in data.batches(batch_size, device):
        logits, labels = data.logits(model, batch), batch["labels"]
        if several or data.is_regression or not data.task.classifies:
            raise StatisticsError(f"f1 is of single labels, and this {data.task.name} model predicts others; use loss")
        counted = labels != IGNORED
        pairs.append(torch.stack([logits.argmax(-1)[counted], labels[counted]]).cpu())
    predicted, true = torch.cat(pairs, 1)
    names = torch.unique(torch.cat([predicted, true])).tolist()
    binary = data.config.num_labels == 2 and not data.task.per_token

    def of(name: int) -> float:
        hits = int(((predicted == name) & (true == name)).sum())
        return 2 * hits / max(1, int((predicted == name).sum()) + int((true == name).sum()))

    return of(1) if binary else sum(map(of, names)) / len(names)
