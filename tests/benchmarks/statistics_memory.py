"""What measuring statistics takes of memory and time, for a random Llama: whole Grams, sketches, several passes.

    python tests/benchmarks/statistics_memory.py [--layers 12] [--hidden 1024] [--examples 16]

Every row is a process of its own. Memory is its peak above what it held with the model loaded; time is relative to that of
the losses and their gradients alone. The first row is that: forward and backward passes with nothing measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from adapters import peak, reset_peak

JOBS: dict[str, dict[str, Any] | None] = {
    "losses and gradients alone": None,
    "Grams": {"kind": "gram"},
    "K-FAC": {"kind": "kfac"},
    "K-FAC, sketched, rank 64": {"kind": "kfac", "rank": 64},
    "K-FAC, sums in 500 MB": {"kind": "kfac", "memory": "500MB"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        return print(json.dumps(measure(arguments.folder, JOBS[arguments.job])))
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary), arguments)
        print("| measured | peak memory | time ÷ losses and gradients | passes | file |")
        print("|---|---|---|---|---|")
        first = None
        for name in JOBS:
            command = [sys.executable, __file__, "--folder", temporary, "--job", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            first = first or found["seconds"]
            print(
                f"| {name} | {found['megabytes']:.0f} MB | {found['seconds'] / first:.1f} | {found['passes']} "
                f"| {found['file']:.0f} MB |",
                flush=True,
            )


def measure(folder: Path, options: dict[str, Any] | None) -> dict[str, float]:
    """Measure, and return the peak memory above the loaded model, the seconds from there on, passes and the file's size."""
    import mats_hub
    from mats_hub.statistics import measure, tasks

    state: dict[str, Any] = {"passes": 0}
    open_task = tasks.open_task

    def started(*arguments: Any, **others: Any) -> Any:  # the model is loaded then
        data = open_task(*arguments, **others)
        state.update(before=reset_peak(), started=time.perf_counter())
        return data

    def counted(items: Any, total: int, description: str) -> Any:
        state["passes"] += 1
        return items

    measure.open_task = started  # type: ignore[attr-defined]
    output = folder / "statistics.safetensors"
    if options is None:
        measure.collect = passed_over  # type: ignore[attr-defined]
    mats_hub.compute_statistics(
        folder, dataset=folder / "data.jsonl", output=output, batch_size=4, progress=counted, device="cpu",
        **(options or {"kind": "fisher"}),
    )  # fmt: skip
    seconds, megabytes = time.perf_counter() - state["started"], peak() - state["before"]
    files = [path for path in folder.glob("statistics*.safetensors")]
    size = sum(path.stat().st_size for path in files) / 1e6
    for path in files:
        path.unlink()
    return {"seconds": seconds, "megabytes": megabytes, "passes": state["passes"], "file": size}


def passed_over(model: Any, batches: Any, kinds: Any, loss: Any, *others: Any) -> Any:
    """Stand in for the collection: losses and gradients with respect to the first layer's input, nothing summed."""
    from mats_hub.statistics.accumulate import Sums

    sums = Sums()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.detach().requires_grad_())
    for batch in batches:
        loss(model, batch).backward()
        sums.examples += 1
    return sums


def make(folder: Path, arguments: argparse.Namespace) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    hidden = arguments.hidden
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 29 // 8,
        num_hidden_layers=arguments.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    print(f"a Llama of {model.num_parameters() / 1e6:.0f}M parameters, {arguments.examples} examples", flush=True)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 32000)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[UNK]").save_pretrained(folder)
    ids = torch.randint(1, 32000, (arguments.examples, 64)).tolist()
    rows = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
