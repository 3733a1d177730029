"""What reading experts by range takes of memory, disk and time against fetching them first: random Llamas in bfloat16.

    python tests/benchmarks/streaming.py [--layers 12] [--hidden 1024] [--experts 3] [--methods task_arithmetic ties]

The models (by default 509 MB each, in 3 shards) are served by the tests' own Hub on loopback. Every row is a process with a
cache of its own; memory is the peak of the whole process, disk what lies in its cache of the Hub when it ends. Time is
relative to fetching first; on loopback the network is as fast as the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapters import peak

TESTS = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        method, way, folder = arguments.job
        return print(json.dumps(merge(method, way == "streamed", arguments.experts, Path(folder))))
    sys.path.insert(0, str(TESTS))
    from hub_server import LocalHub

    names = ["base", *(f"expert{number}" for number in range(arguments.experts))]
    with LocalHub() as hub, tempfile.TemporaryDirectory() as temporary:
        hub.add_user("alice")
        for seed, name in enumerate(names):
            folder = Path(temporary, name)
            make(folder, arguments, seed)
            hub.create(f"alice/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
            shutil.rmtree(folder)
        print(f"base and {arguments.experts} experts of {size:.0f} MB each\n")
        print("| method | weights are | peak memory | in the cache | sent by the Hub | time |")
        print("|---|---|---|---|---|---|")
        for method in arguments.methods:
            first = None
            for way in ("fetched", "streamed"):
                home = Path(temporary, f"{method}-{way}")
                environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
                before = hub.downloaded()
                command = [
                    sys.executable,
                    __file__,
                    "--experts",
                    str(arguments.experts),
                    "--job",
                    method,
                    way,
                    str(home),
                ]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                first = first or found["seconds"]
                print(
                    f"| {method} | {way} | {found['memory']:.0f} MB | {found['disk']:.0f} MB "
                    f"| {(hub.downloaded() - before) / 1e6:.0f} MB | {found['seconds'] / first:.2f} |",
                    flush=True,
                )
                shutil.rmtree(home)


def make(folder: Path, arguments: argparse.Namespace, seed: int) -> None:
    """Save a random Llama; experts are the base and a little noise."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden, num_hidden_layers=arguments.layers, intermediate_size=arguments.hidden * 11 // 4,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.add_(torch.randn(parameter.shape) * 0.001)
    model.save_pretrained(folder, max_shard_size="200MB")


def merge(method: str, stream: bool, experts: int, folder: Path) -> dict[str, float]:
    import mats_hub

    started = time.perf_counter()
    models = [f"alice/expert{number}" for number in range(experts)]
    mats_hub.merge(models, base="alice/base", method=method, stream=stream, output=folder / "merged", device="cpu")
    seconds = time.perf_counter() - started
    cached = sum(
        path.stat().st_size for path in (folder / "hub").rglob("*") if path.is_file() and not path.is_symlink()
    )
    return {"seconds": seconds, "memory": peak(), "disk": cached / 1e6}


if __name__ == "__main__":
    main()
