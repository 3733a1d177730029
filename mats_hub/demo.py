"""The demonstration: three small experts trained here, on data that comes with scikit-learn, then merged and compared.

Only the training is the demonstration's own: everything else is the public functions, as for any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mats_hub.device import one_thread
from mats_hub.errors import SourceError
from mats_hub.evaluation import evaluate
from mats_hub.loading import load, quiet
from mats_hub.merged_model import MergedModel, merge
from mats_hub.output import check_output, staged
from mats_hub.progress import Progress
from mats_hub.statistics import STATISTICS_FILE, compute_statistics


@dataclass(frozen=True)
class DemoTask:
    """A question about handwritten digits: how many quarters they are turned by, and what is asked."""

    turns: int
    labels: tuple[str, ...]
    label: Callable[[int], int]


TASKS = {
    "upright-digit": DemoTask(0, tuple("0123456789"), lambda digit: digit),
    "sideways-parity": DemoTask(1, ("even", "odd"), lambda digit: digit % 2),
    "upside-down-size": DemoTask(2, ("0 to 4", "5 to 9"), lambda digit: int(digit > 4)),
}
METHODS = ("average", "ties", "regmean", "mats")
MATS = {"normalization": "trace", "preconditioner": "kronecker", "iterations": 30}
DAMPINGS = (1.0, 0.3, 0.1)
"""Among these MaTS's damping is chosen, on validation data."""

SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, 1797)}
BASE_STEPS, EXPERT_STEPS, BATCH = 1600, 100, 64


def run_demo(output: str | Path, device: str, progress: Progress, say: Callable[[str], None]) -> Path:
    """Train, measure, merge with each method, evaluate, and write base, experts and the MaTS merge into a folder.

    Args:
        output: the folder to write, which must not exist or be empty.
        device: where to compute.
        progress: wraps iterations to show them (iterable, total, description).
        say: prints a line.

    Returns:
        The merged model's folder.

    Raises:
        SourceError: scikit-learn is not installed.
        OutputError: the folder holds something.

    """
    target = check_output(output)
    with staged(target) as stage, one_thread():
        say("Training a small vision transformer on handwritten digits (the base), and three experts from it:")
        say(f"  {', '.join(TASKS)}; each has labels and a head of its own.")
        data = make_experts(stage, device, progress)
        _compare(stage, data, device, progress, say)
    say(f"\nWritten: {target / 'merged'} (README.md is its model card), with base and experts beside it. Next:")
    say(f"  mats-hub plan {target}/experts/* --base {target}/base --method mats --damping {DAMPINGS[-1]}")
    say(f"  python -c \"import mats_hub; print(mats_hub.load('{target / 'merged'}', task='{next(iter(TASKS))}'))\"")
    say(f"  mats-hub push {target / 'merged'} OWNER/NAME")
    return target / "merged"


def make_experts(folder: Path, device: str, progress: Progress) -> dict[str, dict[str, Any]]:
    """Train the base and the experts into ``base`` and ``experts/NAME`` of a folder, with the experts' statistics.

    Returns:
        Task → split (train, validation, test) → its data set.

    """
    data = {name: _digits(task) for name, task in TASKS.items()}
    with one_thread():
        with quiet():
            _train_models(folder, data, progress)
        for name in TASKS:
            compute_statistics(
                folder / "experts" / name,
                dataset=data[name]["train"],
                batch_size=50,
                device=device,
                output=folder / "experts" / name / STATISTICS_FILE,
                progress=progress,
            )
    return data


def _compare(stage: Path, data: dict[str, Any], device: str, progress: Progress, say: Callable[[str], None]) -> None:
    """Merge with every method, keep the MaTS merge with the best validation accuracy, print and record test accuracies."""
    folders = [str(stage / "experts" / name) for name in TASKS]

    def merged(method: str, **options: Any) -> MergedModel:
        return merge(folders, base=str(stage / "base"), method=method, device=device, progress=progress, **options)

    def accuracies(model_of: Callable[[str], Any], split: str) -> list[float]:
        return [
            evaluate(model_of(name), dataset=sets[split], processor=stage / "base", device=device)
            for name, sets in data.items()
        ]

    candidates = [(merged("mats", **MATS, damping=damping), damping) for damping in DAMPINGS]
    best, damping = max(candidates, key=lambda candidate: sum(accuracies(candidate[0].load, "validation")))
    say(f"\nMaTS: damping {damping:g} of {', '.join(f'{d:g}' for d in DAMPINGS)}, chosen on validation data.")
    scores = {"expert": accuracies(lambda name: load(stage / "experts" / name), "test")}
    for method in METHODS:
        final = method == "mats"
        scores["merged" if final else method] = accuracies((best if final else merged(method)).load, "test")
    best.save(stage / "merged")
    MergedModel.open(stage / "merged").add_results(
        [
            {"task": name, "metric": "accuracy", "model": model, "value": value, "dataset": f"digits, {name}"}
            for model, values in scores.items()
            for name, value in zip(TASKS, values, strict=True)
        ]
    )
    say(f"\n{'test accuracy':16}" + "".join(f"{name:>18}" for name in TASKS) + f"{'mean':>8}")
    for model, values in scores.items():
        label = {"merged": "mats (merged)", "expert": "the experts"}.get(model, model)
        say(f"{label:16}" + "".join(f"{value:18.3f}" for value in values) + f"{sum(values) / len(values):8.3f}")


def _digits(task: DemoTask) -> dict[str, Any]:
    """Return a task's train, validation and test sets."""
    import datasets
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise SourceError(
            "the demo needs scikit-learn's digits; install them with pip install 'mats-hub[demo]'"
        ) from None
    digits = load_digits()
    images = [Image.fromarray((image * 255 / 16).astype("uint8")).rotate(90 * task.turns) for image in digits.images]
    labels = [task.label(int(digit)) for digit in digits.target]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.labels))})
    return {
        split: datasets.Dataset.from_dict({"image": images[part], "label": labels[part]}, features=features)
        for split, part in SPLITS.items()
    }


def _train_models(stage: Path, data: dict[str, Any], progress: Progress) -> None:
    """Train the base to read digits in every orientation, drop its head, and fine-tune an expert for each task."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config: Any = ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        id2label=dict(enumerate(TASKS["upright-digit"].labels)), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    processor = ViTImageProcessorPil(do_resize=False)
    digit = TASKS["upright-digit"]
    turned = [_pixels(processor, _digits(replace(digit, turns=task.turns))["train"]) for task in TASKS.values()]
    model = ViTForImageClassification(config)
    together = tuple(torch.cat(parts) for parts in zip(*turned, strict=True))
    _train(model, together, BASE_STEPS, 1e-3, progress, "training the base")
    model.vit.save_pretrained(stage / "base")
    processor.save_pretrained(stage / "base")
    for name, task in TASKS.items():
        names = dict(enumerate(task.labels))
        torch.manual_seed(1)
        expert = ViTForImageClassification.from_pretrained(
            stage / "base", id2label=names, label2id={label: index for index, label in names.items()}
        )
        _train(expert, _pixels(processor, data[name]["train"]), EXPERT_STEPS, 3e-4, progress, f"training {name}")
        expert.save_pretrained(stage / "experts" / name)
        processor.save_pretrained(stage / "experts" / name)


def _pixels(processor: Any, dataset: Any) -> tuple[Any, Any]:
    import torch

    images = [image.convert("RGB") for image in dataset["image"]]
    return processor(images, return_tensors="pt")["pixel_values"], torch.tensor(list(dataset["label"]))


def _train(model: Any, data: Sequence[Any], steps: int, rate: float, progress: Progress, description: str) -> None:
    import torch

    pixels, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in progress(range(steps), steps, description):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        model(pixel_values=pixels[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
