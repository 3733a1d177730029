"""Where the time of a merge goes: reading, copying to the device, computing, writing.

    python tests/benchmarks/stages.py [--device cuda] [--hidden 2048] [--layers 16] [--methods task_arithmetic ties mats]

A base and three experts of a Llama of this size, in bfloat16, are made in a temporary folder and merged by each method (MaTS on
the task vectors' own Grams, which needs no statistics). The stages wait for the device, so that each is charged its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mats_hub
from mats_hub import merging
from mats_hub.checkpoint import Checkpoint, CheckpointWriter

STAGES = ("read", "copy", "compute", "write", "rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--methods", nargs="+", default=["average", "task_arithmetic", "ties", "mats"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        size = make_models(Path(root), arguments.hidden, arguments.layers, arguments.device)
        print(f"base and three experts of {size / 1e6:.0f} MB each, on {arguments.device}")
        print(f"| method | {' | '.join(STAGES)} | seconds | read and written, MB/s |")
        print("|---|" + "---|" * (len(STAGES) + 2))
        for method in arguments.methods:
            for run in range(2):  # the first one warms up
                total, stages = merge(Path(root), method, arguments.device, Path(root) / f"{method}{run}")
            shares = " | ".join(f"{stages[name] / total:.0%}" for name in STAGES)
            print(f"| {method} | {shares} | {total:.2f} | {5 * size / total / 1e6:.0f} |", flush=True)


def make_models(root: Path, hidden: int, layers: int, device: str) -> int:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=32000,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).bfloat16()
    for name in ("base", "a", "b", "c"):
        if name != "base":
            for parameter in model.parameters():
                parameter.data += 1e-3 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
    return sum(file.stat().st_size for file in (root / "base").glob("*.safetensors"))


def merge(root: Path, method: str, device: str, output: Path) -> tuple[float, Counter[str]]:
    """Return a merge's seconds, and those of each stage."""
    spent: Counter[str] = Counter()
    options: dict[str, Any] = {"curvature": "task_vector"} if method == "mats" else {}
    experts = [str(root / name) for name in "abc"]
    with measured(spent, device):
        started = time.perf_counter()
        mats_hub.merge(experts, base=str(root / "base"), method=method, device=device, output=output, **options)
        total = time.perf_counter() - started
    spent["rest"] = total - sum(spent.values())
    return total, spent


@contextmanager
def measured(spent: Counter[str], device: str) -> Iterator[None]:
    """Charge the time inside of some functions to a stage, less what is charged to another one that they call."""
    running: list[float] = []

    def charged(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            running.append(0.0)
            started = time.perf_counter()
            value = function(*args, **named)
            if device != "cpu":
                torch.cuda.synchronize()
            whole = time.perf_counter() - started
            spent[stage] += whole - running.pop()
            if running:
                running[-1] += whole
            return value

        return call

    places: list[tuple[Any, str, str]] = [
        (Checkpoint, "tensor", "read"),
        (Checkpoint, "part", "read"),
        (merging, "deltas_at", "copy"),
        (merging, "check_finite", "compute"),
        (merging, "prepare", "compute"),
        (merging, "finish", "compute"),
        (merging, "_merge_in_parts", "compute"),
        (CheckpointWriter, "put_part", "write"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, stage in places:
        setattr(owner, name, charged(stage, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


if __name__ == "__main__":
    main()
