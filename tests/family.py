"""A small family for tests of the whole way: a BERT body, experts with heads of their own, data, statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from hub_server import LocalHub
from transformers import BertForSequenceClassification

EXPERT_CARD = "---\nlicense: apache-2.0\n---\n# an expert\n"
LABELS = {"alpha": 2, "beta": 3, "gamma": 2}


@dataclass(frozen=True)
class Family:
    """Folders of one base and its experts; each expert has its data beside it as data.jsonl."""

    root: Path

    @property
    def base(self) -> str:
        return str(self.root / "base")

    @property
    def experts(self) -> list[str]:
        return [str(self.root / name) for name in LABELS]

    def data(self, name: str) -> Path:
        return self.root / f"{name}.jsonl"


def make_family(root: Path, dtype: torch.dtype = torch.float32, card: str = "", first: int = 0) -> Family:
    """Write base (a body without a head), three experts with heads of 2, 3 and 2 labels, and their data."""
    family = Family(root)
    models.save(models.tiny_bert_body(seed=first).to(dtype), root / "base", "bert")
    for seed, (name, count) in enumerate(LABELS.items(), start=first + 1):
        save_expert(family, name, count, seed, dtype)
        if card:
            (root / name / "README.md").write_text(card)
        texts = models.tiny_texts(24, seed, shortest=3)
        rows = [{"text": text, "label": index % count} for index, text in enumerate(texts)]
        family.data(name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return family


def publish(hub: LocalHub, family: Family, token: str | None = None) -> str:
    """Put the family on the Hub as alice's and return her token."""
    token = hub.add_user("alice", token=token)
    for folder in (family.base, *family.experts):
        hub.create(f"alice/{Path(folder).name}", {p.name: p.read_bytes() for p in Path(folder).iterdir()})
    return token


def save_expert(family: Family, name: str, labels: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
    names = {i: f"{name}-{i}" for i in range(labels)}
    with models.seeded(seed):
        model = BertForSequenceClassification.from_pretrained(
            family.base, id2label=names, label2id={label: i for i, label in names.items()}
        )
    models.shaken(model.parameters(), seed, 0.05)
    models.save(model.to(dtype), family.root / name, "bert")
