"""How a merge's time grows with the number of experts, of layers, and with their width, as fitted exponents of one run.

    python tests/benchmarks/growth.py [--methods average ties mats] [--runs 3]

Random Llamas in float32; MaTS on the task vectors' own Grams, 10 steps. The time is that of reading, merging and writing the
weights, the least of the runs. An exponent of 1 is linear; the arithmetic's own are printed beside it: an average is linear in
the entries (width²), a solve by Grams takes products of width³.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mats_hub
from mats_hub import merging

START = {"experts": 2, "layers": 4, "width": 512}
GROWTH = {"experts": (2, 3, 4, 6, 8), "layers": (2, 4, 8, 16), "width": (256, 384, 512, 768, 1024)}
EXPECTED = {"experts": 1, "layers": 1, "width": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["average", "ties", "mats"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"| method | {' | '.join(GROWTH)} |\n|---|{'---|' * len(GROWTH)}")
    found: dict[str, dict[str, list[tuple[int, float]]]] = {m: {name: [] for name in GROWTH} for m in arguments.methods}
    for name, values in GROWTH.items():
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                shape = START | {name: value}
                make(Path(folder), **shape)
                for method in arguments.methods:
                    seconds = min(merge(Path(folder), method, shape["experts"]) for _ in range(arguments.runs))
                    found[method][name].append((value, seconds))
    for method, grown in found.items():
        cells = []
        for name, points in grown.items():
            own = EXPECTED[name] + (1 if name == "width" and method == "mats" else 0)
            cells.append(f"{exponent(points):.2f} (arithmetic: {own})")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def make(root: Path, experts: int, layers: int, width: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=2 * width, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    for number in range(experts):
        for parameter in model.parameters():
            parameter.data += 1e-3 * torch.randn(parameter.shape)
        model.save_pretrained(root / f"expert{number}")


def merge(root: Path, method: str, experts: int) -> float:
    """Return the seconds that reading, merging and writing the weights takes."""
    spent, real = [], merging.merge_tensors

    def clocked(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = real(*arguments, **options)
        spent.append(time.perf_counter() - started)
        return result

    options = {"curvature": "task_vector", "iterations": 10, "damping": 0.0} if method == "mats" else {}
    folders = [str(root / f"expert{number}") for number in range(experts)]
    merging.merge_tensors = clocked
    try:
        mats_hub.merge(folders, base=str(root / "base"), method=method, device="cpu", **options)
    finally:
        merging.merge_tensors = real
    return spent[0]


def exponent(points: list[tuple[int, float]]) -> float:
    """Return the slope of the line through the logarithms, by least squares."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    middle = sum(xs) / len(xs)
    return sum((x - middle) * y for x, y in zip(xs, ys, strict=True)) / sum((x - middle) ** 2 for x in xs)


if __name__ == "__main__":
    main()
