"""Train the experts that experts.py measures: per task an adapter or a full checkpoint, with a classifier of its own.

    python tests/benchmarks/train_experts.py --tasks TASKS --base BASE --output EXPERTS [--kind full] [--seed 1]

TASKS holds a folder per task with train.jsonl (text, label) and labels.json; EXPERTS gets a folder per task.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mats_hub.device import choose_device

LEARNING_RATES = {"lora": 1e-3, "ia3": 1e-2, "full": 1e-4}
LAYERS = ["query", "key", "value", "intermediate.dense", "output.dense"]
CONFIGS = {
    "lora": peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=LAYERS),
    "ia3": peft.IA3Config(task_type="SEQ_CLS"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kind", choices=LEARNING_RATES, default="ia3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48)
    arguments = parser.parse_args()
    for folder in sorted(arguments.tasks.iterdir()):
        if not (arguments.output / folder.name).exists():
            train(folder, arguments)


def train(folder: Path, arguments: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    labels = json.loads((folder / "labels.json").read_text())
    names = labels if isinstance(labels, list) else [labels[key] for key in sorted(labels, key=int)]
    torch.manual_seed(arguments.seed)
    device = choose_device()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.base, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    if arguments.kind in CONFIGS:
        model = peft.get_peft_model(model, CONFIGS[arguments.kind])
    model.to(device)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=LEARNING_RATES[arguments.kind]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, arguments.steps)
    draw, recent = random.Random(arguments.seed), []
    model.train()
    for step in range(arguments.steps):
        batch = draw.sample(rows, arguments.batch_size)
        inputs = tokenizer(
            [row["text"] for row in batch],
            padding=True,
            truncation=True,
            max_length=arguments.max_length,
            return_tensors="pt",
        ).to(device)
        loss = model(**inputs, labels=torch.tensor([row["label"] for row in batch], device=device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = [*recent[-49:], float(loss.detach())]
        if (step + 1) % 100 == 0:
            print(f"{folder.name}: step {step + 1}, loss {sum(recent) / len(recent):.3f}", flush=True)
    model.save_pretrained(arguments.output / folder.name)
    if arguments.kind == "full":
        tokenizer.save_pretrained(arguments.output / folder.name)


if __name__ == "__main__":
    main()
