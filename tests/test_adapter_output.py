"""LoRA adapters merged into a LoRA adapter: the same model as the full merge, without reading the base's weights."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import models
import peft
import pytest
import torch
import transformers
import yaml
from hub_server import validate_card

import mats_hub
from mats_hub.errors import MatsError, NumericalError

RTOL = 1e-5
FAMILIES = {
    "bert": (
        models.tiny_bert_body,
        {"text": models.tiny_texts(8, 1), "label": [0, 1] * 4},
        ["query", "dense"],
        "SEQ_CLS",
    ),
    "gpt2": (models.tiny_gpt2, {"text": models.tiny_texts(8, 1)}, ["c_attn", "attn.c_proj"], "CAUSAL_LM"),
    "llama": (models.tiny_llama, {"text": models.tiny_texts(8, 1)}, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM"),
    "t5": (
        models.tiny_t5,
        {"text": models.tiny_texts(8, 1), "target": models.tiny_texts(8, 2)},
        ["q", "wo"],
        "SEQ_2_SEQ_LM",
    ),
}
EXACT = [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.6}),
    ("regmean", {}),
    ("mats", {"curvature": "gram", "iterations": 3}),
    ("mats", {"curvature": "gram", "solver": "exact", "initialization": "task_arithmetic", "scale": 0.5}),
]
DENSE = [("ties", {"density": 0.5}), ("dare", {"density": 0.7}), ("mats", {"iterations": 4})]


@pytest.fixture(scope="module", params=FAMILIES)
def adapters(request, tmp_path_factory):
    """Make a base and three adapters of it that differ in rank, scaling and, the last one, in the modules they touch."""
    factory, data, targets, task_type = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    factory(root / "base")
    settings = (
        {"r": 2, "alpha": 8, "target_modules": targets},
        {"r": 3, "alpha": 4, "target_modules": targets, "rslora": True},
        {"r": 2, "alpha": 2, "target_modules": targets[:1], "alpha_pattern": {targets[0]: 6}},
    )
    for seed, options in enumerate(settings, start=1):
        folder = root / f"adapter{seed}"
        labels = {"labels": 2} if task_type == "SEQ_CLS" else {}
        models.lora_adapter(root / "base", folder, seed=seed, task_type=task_type, **options, **labels)
        mats_hub.compute_statistics(
            folder, dataset=datasets.Dataset.from_dict(data), kind="kfac", output=folder / "statistics.safetensors"
        )
    return root, [str(root / f"adapter{seed}") for seed in (1, 2, 3)], task_type


def body(merged, root: Path, task_type: str) -> dict[str, torch.Tensor]:
    """Return the merged model's weights; an adapter is loaded by PEFT itself on the base."""
    if not (merged.folder / "adapter_config.json").exists():
        task = "adapter1" if merged.report.experts[0]["kept"] else None
        return merged.load(task, dtype="float32").state_dict()
    base = getattr(transformers, models.AUTO_CLASSES[task_type]).from_pretrained(root / "base")
    return peft.PeftModel.from_pretrained(base, merged.folder).merge_and_unload().state_dict()


@pytest.mark.parametrize(("method", "options"), EXACT)
def test_in_factors_the_adapter_is_the_full_merge(adapters, method, options):
    root, experts, task_type = adapters
    full = mats_hub.merge(experts, base=str(root / "base"), method=method, **options)
    small = mats_hub.merge(experts, base=str(root / "base"), method=method, format="adapter", **options)
    theirs, ours = body(full, root, task_type), body(small, root, task_type)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "classifier" not in key:
            # A closed form in float32 carries rounding times the condition of a Gram of forty tokens: both solve it as well.
            torch.testing.assert_close(ours[key], value, rtol=RTOL, atol=1e-3 if options.get("solver") else 1e-5)
    records = [record for record in small.report.tensors if record.rank]
    assert records
    assert all(record.truncation == 0 and record.rank <= 7 for record in records)
    by_key = {record.key: record for record in full.report.tensors}
    for record in records:  # even the path of the solve is the same
        assert record.iterations == by_key[record.key].iterations
        if options.get("solver"):
            assert record.residual < 1e-3
            assert by_key[record.key].residual < 1e-3
        assert record.solution_norm == pytest.approx(by_key[record.key].solution_norm, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("method", "options"), DENSE)
def test_otherwise_the_recorded_error_is_what_the_cut_leaves_out(adapters, method, options):
    root, experts, task_type = adapters
    full = mats_hub.merge(experts, base=str(root / "base"), method=method, **options)
    small = mats_hub.merge(experts, base=str(root / "base"), method=method, format="adapter", rank=24, **options)
    theirs, ours = body(full, root, task_type), body(small, root, task_type)
    for key, value in theirs.items():
        if "classifier" not in key:
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=2e-5)
    cut = mats_hub.merge(experts, base=str(root / "base"), method=method, format="adapter", rank=1, **options)
    worst = max(record.truncation or 0 for record in cut.report.tensors)
    assert 0.01 < worst < 1
    assert "cuts off at most" in (cut.folder / "README.md").read_text()


def test_the_base_weights_are_not_read(adapters, tmp_path):
    root, experts, _ = adapters
    path = root / "base" / "model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:length] + b"\xff" * (len(data) - length))  # NaN everywhere
    try:
        merged = mats_hub.merge(experts, base=str(root / "base"), method="regmean", format="adapter")
        assert all(record.truncation == 0 for record in merged.report.tensors if record.rank)
        with pytest.raises(NumericalError, match="the base has a NaN"):
            mats_hub.merge(experts, base=str(root / "base"), method="regmean")
    finally:
        path.write_bytes(data)


def test_the_folder_is_an_adapter_repository(adapters):
    root, experts, task_type = adapters
    merged = mats_hub.merge(experts, base=str(root / "base"), method="average", format="adapter", dtype="bfloat16")
    assert not (merged.folder / "config.json").exists()
    config = json.loads((merged.folder / "adapter_config.json").read_text())
    assert config["task_type"] == (None if task_type == "SEQ_CLS" else task_type)
    assert str(root) not in json.dumps(config)
    text = (merged.folder / "README.md").read_text()
    assert validate_card(text) == ([], [])
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    again = mats_hub.merge([str(merged.folder)], base=str(root / "base"), method="average", allow_other_base=True)
    assert again.report.experts[0]["kind"].startswith("LoRA adapter")
    if task_type == "SEQ_CLS":
        model = merged.load("adapter2", base=root / "base")
        own = mats_hub.load(experts[1])
        assert torch.equal(model.classifier.weight, own.classifier.weight)


def test_what_is_no_adapter_is_refused(adapters, tmp_path):
    root, experts, _ = adapters
    with pytest.raises(MatsError, match=r"output format 'adapter' merges LoRA adapters, but .* is a full checkpoint"):
        mats_hub.merge([*experts, str(root / "base")], base=str(root / "base"), method="average", format="adapter")
    with pytest.raises(MatsError, match="rank belongs to output format 'adapter'"):
        mats_hub.merge(experts, base=str(root / "base"), method="average", rank=3)
