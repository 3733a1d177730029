"""Merges of a random Llama in bfloat16 beside a plain loop over the tensors, and beside mergekit where it is installed.

    python tests/benchmarks/peers.py [--mergekit PATH-OF-mergekit-yaml] [--layers 12] [--hidden 1024] [--runs 3]

The loop reads each tensor of every model once, averages in float32 and writes once: nothing that moves all bytes is faster. Every
row is a process of its own, on one thread, in turns; time is of the whole process less what importing takes, which is
measured in the same way, as the median of the runs. Memory is the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from streaming import make

METHODS = {
    "average": ("linear", {}, {"weight": 1 / 3}),
    "task_arithmetic": ("task_arithmetic", {"scale": 0.4}, {"weight": 0.4}),
    "ties": ("ties", {"density": 0.2}, {"weight": 1.0, "density": 0.2}),
    "dare_ties": ("dare_ties", {"density": 0.5}, {"weight": 1.0, "density": 0.5}),
}
"""Method → its name in mergekit, our options, mergekit's parameters of each model."""

SHARD = 200_000_000


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
        return job(*arguments.job)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for seed, name in enumerate(["base", *(f"expert{number}" for number in range(arguments.experts))]):
            make(root / name, arguments, seed)
        size = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors")) / 1e6
        print(f"base and {arguments.experts} experts of {size:.0f} MB each\n")
        print("| method | by | time ÷ the loop's | time ÷ mats_hub's | peak memory |\n|---|---|---|---|---|")
        for method in arguments.methods:
            rows = compare(root, method, arguments.mergekit, arguments.runs)
            for name, (seconds, memory) in rows.items():
                loop, ours = seconds / rows["loop"][0], seconds / rows["mats_hub"][0]
                print(f"| {method} | {name} | {loop:.2f} | {ours:.2f} | {memory:.0f} MB |", flush=True)


def compare(root: Path, method: str, mergekit: Path | None, runs: int) -> dict[str, tuple[float, float]]:
    """Return for each program the median of its seconds, and the peak of its memory in MB."""
    name, options, parameters = METHODS[method]
    experts = [str(path) for path in sorted(root.glob("expert*"))]
    recipe = {"experts": experts, "base": str(root / "base"), "method": method, "device": "cpu", **options}
    (root / "recipe.json").write_text(json.dumps(recipe))
    commands = {by: [sys.executable, __file__, "--job", by, root] for by in ("loop", "mats_hub")}
    idle = {by: [sys.executable, __file__, "--job", f"{by} idle", root] for by in commands}
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
        idle["mergekit"] = [mergekit, "--help"]
    found: dict[str, list[tuple[float, float]]] = {by: [] for by in commands}
    for _ in range(runs):
        for by, command in commands.items():
            start, _ = timed(idle[by])
            seconds, memory = timed(command)
            found[by].append((seconds - start, memory))
            shutil.rmtree(root / "merged")
    return {by: (statistics.median(s for s, _ in held), max(m for _, m in held)) for by, held in found.items()}


def timed(command: list) -> tuple[float, float]:
    """Run a command on one thread; return its seconds and the peak of its memory in MB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], env=environment, stdout=-3, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(errors.decode()[-2000:])
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def job(by: str, folder: str) -> None:
    """Merge by our own program or by the loop; when idle, only import what that needs."""
    root, (program, *idle) = Path(folder), by.split()
    recipe = json.loads((root / "recipe.json").read_text())
    if program == "loop":
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file
    else:
        import mats_hub
        from mats_hub import merged_model  # noqa: F401
    if idle:
        return
    if program == "mats_hub":
        mats_hub.merge(output=root / "merged", **recipe)
        return
    (root / "merged").mkdir()
    for name in sorted(path.name for path in (root / "base").glob("*.safetensors")):
        files = [safe_open(root / expert / name, "pt") for expert in recipe["experts"]]
        merged = {}
        for key in list(files[0].keys()):
            total = torch.zeros(files[0].get_slice(key).get_shape())
            for file in files:
                total += file.get_tensor(key)
            merged[key] = (total / len(files)).bfloat16()
        save_file(merged, root / "merged" / name)


if __name__ == "__main__":
    main()
