"""The whole way for each architecture: statistics, plan, merge and load, with full checkpoints and with LoRA adapters."""

from __future__ import annotations

from pathlib import Path

import datasets
import models
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_loading import tiny_nomic_bert

import mats_hub

RTOL = 1e-4
TEXTS = {"text": models.tiny_texts(8, seed=1)}
FAMILIES = {
    "gpt2": (models.tiny_gpt2, TEXTS, 4 * 2, ["c_attn", "c_fc"], "CAUSAL_LM"),
    "llama": (models.tiny_llama, TEXTS, 7 * 2 + 1, ["q_proj", "down_proj"], "CAUSAL_LM"),
    "t5": (
        models.tiny_t5,
        {**TEXTS, "target": models.tiny_texts(8, seed=2)},
        (6 + 10) * 2,
        ["q", "v", "wo"],
        "SEQ_2_SEQ_LM",
    ),
    # Query, key and value are one weight in the checkpoint.
    "nomic_bert": (
        tiny_nomic_bert,
        {**TEXTS, "label": [0, 1] * 4},
        5 * 2 + 2,
        ["q_proj", "v_proj", "down_proj"],
        "SEQ_CLS",
    ),
    "vit": (models.tiny_vit, {"image": models.tiny_images(8), "label": [0, 1, 2] * 2 + [0, 1]}, 6 * 2 + 1, None, None),
}
"""Factory, data, the number of linear weights of their own, LoRA targets and PEFT's task type."""


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param, *FAMILIES[request.param]


def statistics(model: Path, data: dict, **options) -> str:
    dataset = datasets.Dataset.from_dict(data)
    output = Path(model) / "statistics.safetensors"
    mats_hub.compute_statistics(model, dataset=dataset, kind="kfac", batch_size=4, output=output, **options)
    return str(output)


def test_full_checkpoints(family, tmp_path):
    _, factory, data, linear, *_ = family
    base = factory(tmp_path / "base", seed=0)
    experts = []
    for seed in (1, 2):
        folder = tmp_path / f"expert{seed}"
        factory(folder, seed=0)  # for its tokenizer or processor
        models.perturbed(base, seed, 0.05).save_pretrained(folder)
        statistics(folder, data)
        experts.append(str(folder))
    for method, options in (("regmean", {}), ("mats", {"solver": "exact"}), ("mats", {"iterations": 5})):
        merged = mats_hub.merge(experts, base=str(tmp_path / "base"), method=method, **options)
        solved = merged.report.solved
        told = {e.key: e.reason for e in merged.report.tensors if e.action == "initialize"}
        if method == "regmean":
            assert len(solved) == linear, [r.key for r in solved]
        else:  # everything but what stands in no module
            assert all("statistics have a" in reason for reason in told.values())
            assert all(
                "relative_attention_bias" in key or key.endswith(("cls_token", "position_embeddings")) for key in told
            )
            assert len(solved) > linear
        assert all(record.residual < record.residuals[0] or record.residuals[0] < 1e-6 for record in solved)
        loaded = getattr(transformers, type(base).__name__).from_pretrained(merged.folder)
        assert loaded.state_dict().keys() == base.state_dict().keys()
        mine = merged.load().state_dict()
        assert all(torch.equal(value, mine[key]) for key, value in loaded.state_dict().items())
    identical = mats_hub.merge(
        [{"model": experts[0], "name": "one"}, {"model": experts[0], "name": "two"}],
        base=str(tmp_path / "base"), method="mats", iterations=5,
    )  # fmt: skip
    assert {record.iterations for record in identical.report.solved} == {0}
    own = load_file(Path(experts[0]) / "model.safetensors")
    for key, value in load_file(identical.folder / "model.safetensors").items():
        torch.testing.assert_close(value, own[key], rtol=0, atol=1e-7)


def test_lora_adapters(family, tmp_path):
    _, factory, data, _, targets, task_type = family
    if targets is None:
        pytest.skip("covered by the others: ViT's modules are linear as Llama's")
    base = factory(tmp_path / "base", seed=0)
    adapters = []
    for seed, rank in ((1, 2), (2, 3)):
        folder = tmp_path / f"adapter{seed}"
        models.lora_adapter(
            tmp_path / "base", folder, seed=seed, r=rank, alpha=4, target_modules=targets, task_type=task_type
        )
        statistics(folder, data, base=str(tmp_path / "base"))
        adapters.append(folder)
    merged = mats_hub.merge(
        [str(a) for a in adapters], base=str(tmp_path / "base"), method="task_arithmetic", scale=0.7, format="full"
    )
    auto = getattr(transformers, models.AUTO_CLASSES[task_type])
    deltas = []
    for adapter in adapters:
        from peft import PeftModel

        whole = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), adapter).merge_and_unload()
        deltas.append({key: value - base.state_dict()[key] for key, value in whole.state_dict().items()})
    loaded = auto.from_pretrained(merged.folder).state_dict()
    for key, value in base.state_dict().items():
        expected = value + 0.7 * sum(delta[key] for delta in deltas)
        torch.testing.assert_close(loaded[key], expected, rtol=RTOL, atol=1e-5)
    solved = mats_hub.merge(
        [str(a) for a in adapters], base=str(tmp_path / "base"), method="mats", iterations=5
    ).report.solved
    moved = sum(delta.abs().max() > 1e-6 for delta in deltas[0].values() if delta.dim() == 2)
    assert len(solved) == moved + (task_type == "SEQ_CLS")  # the head, which PEFT saves whole and nobody moved


def test_a_tied_weight_may_be_measured_under_a_name_that_is_not_stored(tmp_path):
    """CamemBERT's head comes before its embeddings, so that torch calls the weight they share by the head's name."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.CamembertConfig(**shape, vocab_size=models.VOCABULARY, is_decoder=True, pad_token_id=0)
    with models.seeded(0):
        base = transformers.CamembertForCausalLM(config)
    models.save(base, tmp_path / "base", "bert")
    experts = []
    for seed in (1, 2):
        folder = models.save(models.perturbed(base, seed), tmp_path / f"e{seed}", "bert")
        statistics(folder, TEXTS, modules="all")
        experts.append(str(folder))
    merged = mats_hub.merge(experts, base=str(tmp_path / "base"), method="mats", iterations=3)
    shared = "roberta.embeddings.word_embeddings.weight"
    assert shared in load_file(merged.folder / "model.safetensors")
    assert shared in {record.key for record in merged.report.solved}
