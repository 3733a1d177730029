"""Scoring models on the experts' tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mats_hub.companions import companions_of
from mats_hub.loading import load
from mats_hub.scoring import score
from mats_hub.source import open_source
from mats_hub.statistics.dataset import Columns, listed, load_dataset
from mats_hub.statistics.tasks import open_task


def evaluate(
    model: Any,
    *,
    dataset: Any,
    task: str | None = None,
    config: str | None = None,
    split: str | None = None,
    text: str | Sequence[str] = (),
    label: str | None = None,
    image: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    audio: str | None = None,
    choices: str | Sequence[str] = (),
    processor: str | Path | None = None,
    base: str | Path | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    metric: str = "accuracy",
    device: str = "auto",
    token: str | None = None,
) -> float:
    """Return a model's score on a data set: its accuracy in [0, 1], or another.

    Accuracy is the share of labels that it tells; of choices, or where there are none of tokens, for a language model.

    Args:
        model: a merged model's folder or Hub id, or a transformers model.
        dataset: as for `mats_hub.compute_statistics`.
        task: the task of a merged model whose heads are kept per task.
        config: the data set's configuration.
        split: the data set's split (``validation``).
        text: text column, or two of them.
        label: label column.
        image: image column.
        target: target text column.
        messages: column of conversations.
        audio: column of sounds.
        choices: column of the answers to choose from, or one column for each; a language model then chooses the likeliest.
        processor: where tokenizer and processor of images or sounds come from; the merged model itself otherwise.
        base: the base of an adapter, when it is not the one it names; or that of which the model is a part, and into which it is
            put.
        batch_size: examples in one pass.
        max_length: tokens after which a text is cut.
        metric: ``accuracy``, ``f1``, ``loss`` or ``perplexity``; see `mats_hub.scoring.score`.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        token: Hub token; the one stored on this machine otherwise.

    Raises:
        SourceError: the model or the data cannot be found.
        StatisticsError: task or columns cannot be inferred, or a label does not fit the model.

    """
    from mats_hub.device import choose_device

    place = choose_device(device)
    network = load(model, task, dtype="float32", token=token, base=base) if isinstance(model, str | Path) else model
    loaded, _, _ = load_dataset(dataset, config, split, token)
    if processor is None and not isinstance(model, str | Path):
        raise ValueError(
            "a loaded model needs 'processor': the folder or id its tokenizer, or processor of images or sounds, comes from"
        )
    files = [open_source(processor if processor is not None else model, token)]
    below = base or files[0].json("adapter_config.json").get("base_model_name_or_path")
    if below and (base or not companions_of(files[0])):
        files.append(open_source(below, token))
    columns = Columns(listed(text), label, image, target, messages, audio, listed(choices))
    data = open_task(type(network).__name__, network.config, files, loaded, columns, max_length=max_length)
    data.sort_by_length()
    return score(data, network.to(place), metric, batch_size, place)
