"""Merges of a random Llama in bfloat16 beside a plain loop over the tensors, and beside mergekit where it is installed.

    python tests/benchmarks/peers.py [--mergekit PATH-OF-mergekit-yaml] [--layers 12] [--hidden 1024] [--runs 3]

The loop reads each tensor of every expert once, averages in float32 and writes once, in buffers that are used again: nothing
that moves all bytes is faster. Every row is a process of its own, in turns; times are medians of the runs. The weights' time is
that of reading, merging and writing them (without hashing, plan, card and figures), for mergekit that of the whole less what its
``--help`` takes; the whole time is the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from streaming import make

METHODS = {
    "average": ("linear", {}, {"weight": 1 / 3}),
    "task_arithmetic": ("task_arithmetic", {"scale": 0.4}, {"weight": 0.4}),
    "ties": ("ties", {"density": 0.2}, {"weight": 1.0, "density": 0.2}),
    "dare_ties": ("dare_ties", {"density": 0.5}, {"weight": 1.0, "density": 0.5}),
}
"""Method → its name in mergekit, our options, mergekit's parameters of each model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        name, root = arguments.job[0], Path(arguments.job[1])
        return make_models(root, arguments) if name == "make" else job(name, root)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # In a process of its own: what a child reports as its peak begins with what this process held.
        subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--job", "make", root], check=True, stderr=subprocess.DEVNULL
        )
        size = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors")) / 1e6
        print(f"base and {arguments.experts} experts of {size:.0f} MB each\n")
        print("| method | by | weights ÷ loop | whole ÷ mats_hub | peak memory |\n|---|---|---|---|---|")
        for method in arguments.methods:
            rows = compare(root, method, arguments.mergekit, arguments.runs)
            for by, (weights, whole, memory) in rows.items():
                ratios = f"{weights / rows['loop'][0]:.2f} | {whole / rows['mats_hub'][1]:.2f}"
                print(f"| {method} | {by} | {ratios} | {memory:.0f} MB |", flush=True)


def compare(root: Path, method: str, mergekit: Path | None, runs: int) -> dict[str, tuple[float, float, float]]:
    """Return for each program the medians of its seconds for the weights and on the whole, and the peak of its memory in MB."""
    name, options, parameters = METHODS[method]
    experts = [str(path) for path in sorted(root.glob("expert*"))]
    recipe = {"experts": experts, "base": str(root / "base"), "method": method, "device": "cpu", **options}
    (root / "recipe.json").write_text(json.dumps(recipe))
    commands = {by: [sys.executable, __file__, "--job", by, root] for by in ("loop", "mats_hub")}
    if mergekit:
        theirs = {
            "merge_method": name,
            "dtype": "bfloat16",
            "models": [{"model": expert, "parameters": parameters} for expert in experts],
            "parameters": {"normalize": False},
        }
        if name != "linear":
            theirs["base_model"] = str(root / "base")
        (root / "mergekit.yaml").write_text(yaml.safe_dump(theirs))
        commands["mergekit"] = [mergekit, root / "mergekit.yaml", root / "merged", "--no-copy-tokenizer"]
    imports = statistics.median(timed([mergekit, "--help"])[1] for _ in range(runs)) if mergekit else 0.0
    found: dict[str, list[tuple[float, float, float]]] = {by: [] for by in commands}
    for _ in range(runs):
        for by, command in commands.items():
            weights, whole, memory = timed(command)
            found[by].append((weights or whole - imports, whole, memory))
            shutil.rmtree(root / "merged")
    return {by: tuple(statistics.median(column) for column in zip(*held, strict=True)) for by, held in found.items()}


def timed(command: list) -> tuple[float, float, float]:
    """Run a command; return the seconds it prints, if it does, its own, and the peak of its memory in MB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=errors
        )
        printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise RuntimeError(errors.read().decode()[-2000:])
    seconds = time.perf_counter() - started
    weights = re.search(r"weights: ([\d.]+)", printed)
    return float(weights[1]) if weights else 0.0, seconds, usage.ru_maxrss * 1024 / 1e6


def make_models(root: Path, arguments: argparse.Namespace) -> None:
    for seed, name in enumerate(["base", *(f"expert{number}" for number in range(arguments.experts))]):
        make(root / name, arguments, seed)


def job(by: str, root: Path) -> None:
    """Merge by our own program or by the loop, and print the seconds that the weights took."""
    recipe = json.loads((root / "recipe.json").read_text())
    if by == "loop":
        import torch  # noqa: F401

        started = time.perf_counter()
        (root / "merged").mkdir()
        for base in sorted((root / "base").glob("*.safetensors")):
            average([root / expert / base.name for expert in recipe["experts"]], root / "merged" / base.name)
        print(f"weights: {time.perf_counter() - started}")
        return
    import mats_hub
    from mats_hub import journal, merging

    spent, hashed = [], []
    merging.merge_tensors = clocked(merging.merge_tensors, spent)
    journal.file_sha256 = clocked(journal.file_sha256, hashed)
    mats_hub.merge(output=root / "merged", **recipe)
    print(f"weights: {sum(spent) - sum(hashed)}")


def clocked(function: Callable, seconds: list[float]) -> Callable:
    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    return call


def average(files: list[Path], target: Path, block: int = 2**19) -> None:
    """Write the mean of bfloat16 files of one layout: each read once, block by block, in buffers that are used again."""
    import torch

    buffer, total, wide = torch.empty(block, dtype=torch.bfloat16), torch.empty(block), torch.empty(block)
    with target.open("wb") as out:
        opened = [path.open("rb", buffering=0) for path in files]
        length = int.from_bytes(opened[0].read(8), "little")
        out.write(length.to_bytes(8, "little") + opened[0].read(length))
        for file in opened[1:]:
            file.seek(8 + length)
        raw = buffer.view(torch.uint8).numpy().data
        while True:
            for number, file in enumerate(opened):
                count = (file.readinto(raw) or 0) // 2
                into = wide if number else total
                into[:count].copy_(buffer[:count])
                if number:
                    total[:count] += wide[:count]
            if not count:
                break
            buffer[:count].copy_(total[:count].div_(len(opened)))
            out.write(raw[: 2 * count])
        for file in opened:
            file.close()


if __name__ == "__main__":
    main()
