"""A small family for tests of the whole way: a BERT body, experts with heads of their own, data, statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
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


def config(**changes) -> BertConfig:
    sizes = {"vocab_size": 45, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**{**sizes, "intermediate_size": 24, "max_position_embeddings": 32, **changes})


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip


def make_family(root: Path, dtype: torch.dtype = torch.float32, card: str = "") -> Family:
    """Write base (a body without a head), three experts with heads of 2, 3 and 2 labels, and their data."""
    torch.manual_seed(0)
    family = Family(root)
    BertModel(config()).to(dtype).save_pretrained(family.base)
    tokenizer().save_pretrained(family.base)
    for seed, (name, count) in enumerate(LABELS.items(), start=1):
        save_expert(family, name, count, seed, dtype)
        if card:
            (root / name / "README.md").write_text(card)
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for _ in range(24):
            length = int(torch.randint(3, 12, (1,), generator=generator))
            words = [WORDS[int(i)] for i in torch.randint(0, 40, (length,), generator=generator)]
            rows.append({"text": " ".join(words), "label": int(torch.randint(0, count, (1,), generator=generator))})
        family.data(name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return family


def save_expert(family: Family, name: str, labels: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
    names = {i: f"{name}-{i}" for i in range(labels)}
    model = BertForSequenceClassification.from_pretrained(
        family.base, id2label=names, label2id={label: i for i, label in names.items()}
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    model.to(dtype).save_pretrained(family.root / name)
    tokenizer().save_pretrained(family.root / name)
