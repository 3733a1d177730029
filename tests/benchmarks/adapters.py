"""Merging LoRA adapters: this package against PEFT's `add_weighted_adapter`, side by side; and adapters of a 70B model.

    python tests/benchmarks/adapters.py [--layers 12] [--hidden 1024] [--repeats 3] [--threads 1]
    python tests/benchmarks/adapters.py --large [--method regmean]

The first makes a random Llama and three rank-16 adapters of all its linear modules and times, each in a process of its own:
PEFT's ``svd`` and ``cat`` (the call alone, the model and the adapters being loaded already) and `mats_hub.merge`: the whole
call (reading, planning, merging, writing, card; libraries imported already, as they are for PEFT), and what compares with
PEFT's call, the tensors alone (still read from and written to files). Ratios are of the medians; memory is the peak of the
process above what it held before the call. The second makes four adapters of 80 layers of width
8192 (weights random, no base but its config) and merges them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
JOBS = {
    "PEFT svd, rank 16": ("peft", {"combination_type": "svd", "svd_rank": 16}),
    "PEFT cat": ("peft", {"combination_type": "cat"}),
    "mats_hub, rank 16": ("mats_hub", {"rank": 16}),
    "mats_hub, exact": ("mats_hub", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--method", default="task_arithmetic", help="of the large merge")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep the models there")
    arguments = parser.parse_args()
    if arguments.job:
        return print(json.dumps(run_job(arguments)))
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        if arguments.large:
            make_large(arguments.folder)
            print(json.dumps(child(arguments, "large")))
        else:
            compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    make(arguments.folder, arguments.layers, arguments.hidden)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
    for _ in range(arguments.repeats):
        for name in JOBS:
            found[name].append(child(arguments, name))
    slowest = statistics.median(run["seconds"] for run in found["PEFT svd, rank 16"])
    print("| | tensors alone, svd ÷ this | whole call, svd ÷ this | peak memory above the start | relative error |")
    print("|---|---|---|---|---|")
    for name, runs in found.items():
        whole, alone = (
            statistics.median(run.get(what, run["seconds"]) for run in runs) for what in ("seconds", "alone")
        )
        megabytes = max(run["megabytes"] for run in runs)
        ratios = f"{slowest / alone:.0f} | {slowest / whole:.0f}"
        print(f"| {name} | {ratios} | {megabytes:.0f} MB | {runs[0]['error']:.2e} |", flush=True)


def child(arguments: argparse.Namespace, job: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", job, "--folder", str(arguments.folder), "--method", arguments.method]
    command += ["--threads", str(arguments.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_job(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(arguments.threads)
    folder = arguments.folder
    if arguments.job == "large":
        return merge(folder, [f"adapter{i}" for i in range(4)], method=arguments.method)
    kind, options = JOBS[arguments.job]
    names = [f"adapter{i}" for i in range(3)]
    if kind == "mats_hub":
        result = merge(folder, names, method="task_arithmetic", scale=1.0, **options)
        return {**result, "error": error_of(folder, folder / "merged", names)}
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    before, started = reset_peak(), time.perf_counter()
    model.add_weighted_adapter(names, [1.0] * 3, "merged", **options)
    seconds, megabytes = time.perf_counter() - started, peak() - before
    model.save_pretrained(folder / "peft", selected_adapters=["merged"])
    return {"seconds": seconds, "megabytes": megabytes, "error": error_of(folder, folder / "peft" / "merged", names)}


LIBRARIES = ("matplotlib.figure", "matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama")


def merge(folder: Path, names: list[str], **options: Any) -> dict[str, float]:
    import importlib
    import shutil

    import torch

    import mats_hub
    from mats_hub.adapter_merging import merge_adapters

    for library in (*LIBRARIES, "transformers.core_model_loading", "mats_hub.merged_model"):
        importlib.import_module(library)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    experts, options = [str(folder / name) for name in names], {"base": str(folder / "base"), **options}
    before, started = reset_peak(), time.perf_counter()
    mats_hub.merge(experts, output=folder / "merged", **options)
    seconds, megabytes, highest = time.perf_counter() - started, peak() - before, peak()
    plan = mats_hub.make_plan(mats_hub.Recipe.build(experts, **options))
    with tempfile.TemporaryDirectory() as spare:
        started = time.perf_counter()
        merge_adapters(plan, Path(spare), torch.device("cpu"), {})
        alone = time.perf_counter() - started
    return {"seconds": seconds, "alone": alone, "megabytes": megabytes, "peak": highest}


def peak() -> float:
    """Return the most memory this process held since `reset_peak`, in MB (Linux)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def reset_peak() -> float:
    """Forget the peak so far; return what is held now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def error_of(folder: Path, merged: Path, names: list[str]) -> float:
    """Return the relative Frobenius distance from the sum of the adapters' task vectors, over all modules."""
    from mats_hub.adapter_opening import open_adapter
    from mats_hub.lora import LoraAdapter
    from mats_hub.source import open_source

    adapters = [open_adapter(open_source(folder / name)) for name in names]
    result = open_adapter(open_source(merged))
    assert isinstance(result, LoraAdapter)
    wrong = right = 0.0
    for name in result.factors:
        wanted = sum(adapter.delta(name).dense() for adapter in adapters)
        wrong += float((result.delta(name).dense() - wanted).square().sum())
        right += float(wanted.square().sum())
    return (wrong / right) ** 0.5


def make(folder: Path, layers: int, hidden: int) -> None:
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 29 // 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(folder / "base")
    print(f"base: {base.num_parameters() / 1e6:.0f}M parameters", flush=True)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights="gaussian", task_type="CAUSAL_LM")
    )
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    for index in range(3):
        fill(parameter for name, parameter in model.named_parameters() if "lora_" in name)
        model.save_pretrained(folder / f"adapter{index}")


def fill(parameters: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def make_large(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(config))
    heads = {"k_proj": 1024, "v_proj": 1024, "gate_proj": 28672, "up_proj": 28672}
    for index in range(4):
        target = folder / f"adapter{index}"
        target.mkdir(exist_ok=True)
        tensors = {}
        for layer in range(80):
            for name in TARGETS:
                block = "self_attn" if name[0] in "qkvo" else "mlp"
                module = f"base_model.model.model.layers.{layer}.{block}.{name}"
                inner = 28672 if name == "down_proj" else 8192
                tensors[f"{module}.lora_A.weight"] = torch.randn(16, inner).bfloat16()
                tensors[f"{module}.lora_B.weight"] = torch.randn(heads.get(name, 8192), 16).bfloat16()
        save_file(tensors, target / "adapter_model.safetensors")
        options = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        options["base_model_name_or_path"] = str(folder / "base")
        (target / "adapter_config.json").write_text(json.dumps(options))


if __name__ == "__main__":
    main()
