"""Adapters that are no low-rank deltas by themselves: PEFT merges them into their base, and what that changes is merged.

The oracle is PEFT's own merge of each adapter, by itself.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import transformers
from cases import crossed
from safetensors.torch import load_file, save_file
from torch import Tensor

import mats_hub
from mats_hub.errors import MatsError, PlanError

bert, gpt2, llama, t5, vit = (
    models.tiny_bert_body,
    models.tiny_gpt2,
    models.tiny_llama,
    models.tiny_t5,
    models.tiny_vit,
)
LINEAR = {"bert": ["query", "dense"], "llama": ["q_proj", "down_proj"], "vit": ["q_proj", "fc1"], "t5": ["q", "wo"]}
LINEAR["gpt2"] = ["attn.c_proj", "c_fc"]
FACTORIES = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # what it is: PEFT's config, its options
    "DoRA": ("LoraConfig", {"use_dora": True, "r": 3}),
    "DoRA with rsLoRA": ("LoraConfig", {"use_dora": True, "r": 3, "use_rslora": True}),
    "PiSSA": ("LoraConfig", {"init_lora_weights": "pissa", "r": 2}),
    "OLoRA": ("LoraConfig", {"init_lora_weights": "olora", "r": 2}),
    "LoHa": ("LoHaConfig", {"r": 3}),
    "LoKr": ("LoKrConfig", {"r": 3}),
    "VeRA": ("VeraConfig", {"r": 8}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
}
NOT_ON_CONV1D = ("LoHa", "LoKr", "OFT", "HRA", "OLoRA")
"""Types that PEFT does not make, or does not merge, on transformers' Conv1D."""
CASES = [
    case for case in crossed(FACTORIES, VARIANTS) if case.values[0] != "gpt2" or case.values[1] not in NOT_ON_CONV1D
]


def make(family: str, base: Path, folder: Path, seed: int, class_name: str, **options: Any) -> dict[str, Tensor]:
    """Save an adapter whose tensors are all random; return what PEFT makes of it and the base."""
    loaded = transformers.AutoConfig.from_pretrained(base).architectures[0]
    network = getattr(transformers, loaded).from_pretrained(base)
    config = getattr(peft, class_name)(target_modules=LINEAR[family], **options)
    with models.seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(network, config)
        own = [p for p in model.parameters() if p.requires_grad]
        models.shaken(own, seed, 0.1)
        model.save_pretrained(folder)
        again = getattr(transformers, loaded).from_pretrained(base)
        merged = peft.PeftModel.from_pretrained(again, folder).merge_and_unload()
    return models.state(merged.double())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Hand out saved bases, each made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "base"
            FACTORIES[family](made[family], seed=1)
        return made[family]

    return get


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_merge_is_that_of_what_peft_makes_of_each(bases, tmp_path, family, name):
    class_name, options = VARIANTS[name]
    base = bases(family)
    after = [make(family, base, tmp_path / f"e{i}", i + 1, class_name, **options) for i in range(2)]
    experts = [{"model": str(tmp_path / f"e{i}"), "weight": weight} for i, weight in enumerate((1.0, 3.0))]
    merged = mats_hub.merge(experts, base=str(base), method="average")
    model = merged.load()
    before, written = models.state(models_of(base)), models.state(model)
    moved = 0
    for key, value in before.items():
        want = 0.25 * after[0][key] + 0.75 * after[1][key]
        torch.testing.assert_close(
            written[key].double(), want, rtol=1e-5, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}"
        )
        moved += bool((want - value.double()).abs().max() > 1e-3)
    assert moved >= len(LINEAR[family])
    assert any("PEFT merges it into its base first" in note for note in merged.report.notes)
    kind = {"LoraConfig": "LORA", "VeraConfig": "VERA"}.get(class_name, class_name.removesuffix("Config").upper())
    assert kind in merged.report.experts[0]["kind"]


def models_of(base: Path) -> Any:
    name = transformers.AutoConfig.from_pretrained(base).architectures[0]
    return getattr(transformers, name).from_pretrained(base)


def test_beside_plain_lora_and_a_full_checkpoint(bases, tmp_path):
    base = bases("llama")
    dora = make("llama", base, tmp_path / "dora", 1, "LoraConfig", use_dora=True, r=2)
    plain = make("llama", base, tmp_path / "plain", 2, "LoraConfig", r=2)
    models.save(models.perturbed(models_of(base), 3), tmp_path / "full")
    full = models.state(models_of(tmp_path / "full"))
    folders = [str(tmp_path / name) for name in ("dora", "plain", "full")]
    written = models.state(mats_hub.merge(folders, base=str(base), method="average").load())
    for key, value in written.items():
        torch.testing.assert_close(
            value.double(), (dora[key] + plain[key] + full[key].double()) / 3, rtol=1e-5, atol=1e-5
        )


def test_trained_tokens_are_merged(bases, tmp_path):
    """LoRA with `trainable_token_indices` changes some rows of the embedding as well."""
    base = bases("bert")
    after = [make("bert", base, tmp_path / f"e{i}", i + 1, "LoraConfig", r=2,
                  trainable_token_indices={"word_embeddings": [3, 4 + i]}) for i in range(2)]  # fmt: skip
    written = models.state(
        mats_hub.merge([str(tmp_path / f"e{i}") for i in range(2)], base=str(base), method="average").load()
    )
    before = models.state(models_of(base))
    key = "embeddings.word_embeddings.weight"
    assert {int(row) for row in (written[key] != before[key]).any(1).nonzero()} == {3, 4, 5}
    for name, value in written.items():
        torch.testing.assert_close(value.double(), (after[0][name] + after[1][name]) / 2, rtol=1e-5, atol=1e-5)


def test_a_bias_of_the_second_factor_is_merged(bases, tmp_path):
    base = bases("bert")
    after = make("bert", base, tmp_path / "e0", 1, "LoraConfig", r=2, lora_bias=True)
    written = models.state(mats_hub.merge([str(tmp_path / "e0")], base=str(base), method="average").load())
    key = "encoder.layer.0.attention.self.query.bias"
    assert (after[key] - models.state(models_of(base))[key]).abs().max() > 1e-3
    for name, value in written.items():
        torch.testing.assert_close(value.double(), after[name], rtol=1e-5, atol=1e-5)


def test_as_an_adapter_it_is_refused_with_the_way_out(bases, tmp_path):
    base = bases("bert")
    make("bert", base, tmp_path / "dora", 1, "LoraConfig", use_dora=True, r=2)
    with pytest.raises(PlanError, match=r"use_dora.*--format full"):
        mats_hub.merge([str(tmp_path / "dora")], base=str(base), method="average", format="adapter")


def test_without_the_weights_of_its_base_it_is_refused(bases, tmp_path):
    base = bases("bert")
    make("bert", base, tmp_path / "dora", 1, "LoraConfig", use_dora=True, r=2)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(PlanError, match=r"bare' has no model\.safetensors"):
        mats_hub.merge([str(tmp_path / "dora")], base=str(tmp_path / "bare"), method="average", allow_other_base=True)


def test_what_peft_cannot_merge_is_refused_by_name(bases, tmp_path):
    base = bases("gpt2")
    config = peft.LoraConfig(target_modules=["c_fc"], init_lora_weights="olora", r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(models_of(base), config).save_pretrained(tmp_path / "olora")
    with pytest.raises(MatsError, match=r"olora' is a LORA adapter, which PEFT cannot merge into its base"):
        mats_hub.merge([str(tmp_path / "olora")], base=str(base), method="average")


def test_a_damaged_one_is_refused_by_name(bases, tmp_path):
    base = bases("bert")
    make("bert", base, tmp_path / "loha", 1, "LoHaConfig", r=2)
    file = tmp_path / "loha" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(MatsError, match="loha' is incomplete"):
        mats_hub.merge([str(tmp_path / "loha")], base=str(base), method="average")
    config = tmp_path / "loha" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "NOT_A_TYPE"}))
    with pytest.raises(MatsError, match="NOT_A_TYPE"):
        mats_hub.merge([str(tmp_path / "loha")], base=str(base), method="average")
