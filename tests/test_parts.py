"""Experts that are a part of their base alone: the encoder of CLIP that sees, the language model of one that sees images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import models
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_losses import CLASSES, llava, save_clip  # noqa: F401 (a fixture)

import mats_hub
from mats_hub.errors import PlanError, StatisticsError
from mats_hub.recipe import Recipe

SEES = "vision_model."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """CLIP, two experts that are its encoder of images, the same as whole models, and images of classes."""
    root = tmp_path_factory.mktemp("clip")
    save_clip(root / "base")
    for seed in (1, 2):
        part = models.perturbed(transformers.CLIPVisionModel.from_pretrained(root / "base"), seed, 0.2)
        part.save_pretrained(root / f"part{seed}")
        whole = transformers.CLIPModel.from_pretrained(root / "base")
        state = {key if key.startswith(SEES) else f"{SEES}{key}": value for key, value in part.state_dict().items()}
        assert not whole.load_state_dict(state, strict=False).unexpected_keys
        whole.save_pretrained(root / f"whole{seed}")
        transformers.AutoProcessor.from_pretrained(root / "base").save_pretrained(root / f"whole{seed}")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": models.tiny_images(8), "label": [0, 2, 1, 1, 0, 2, 2, 0]}
    names = {name: [str(root / f"{name}{seed}") for seed in (1, 2)] for name in ("part", "whole")}
    return SimpleNamespace(base=str(root / "base"), data=datasets.Dataset.from_dict(rows, features=features), **names)


def state(folder: str | Path) -> dict[str, Any]:
    return models.state(transformers.CLIPModel.from_pretrained(folder))


def test_parts_are_merged_into_the_whole(clip):
    merged = mats_hub.merge(clip.part, base=clip.base, method="task_arithmetic", scale=0.4)
    same = mats_hub.merge(clip.whole, base=clip.base, method="task_arithmetic", scale=0.4)
    found, expected, base = state(merged.folder), state(same.folder), state(clip.base)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(torch.equal(found[key], value) for key, value in base.items() if not key.startswith(SEES))
    assert not torch.equal(found[f"{SEES}pre_layrnorm.bias"], base[f"{SEES}pre_layrnorm.bias"])
    assert type(merged.load()).__name__ == "CLIPModel"
    assert type(mats_hub.load(merged.folder, "part1")).__name__ == "CLIPModel"
    assert "CLIPModel.from_pretrained" in (merged.folder / "README.md").read_text()
    assert not merged.report.notes


def test_a_part_beside_a_whole_changes_nothing_else(clip, tmp_path):
    whole = models.perturbed(transformers.CLIPModel.from_pretrained(clip.base), 3)
    whole.save_pretrained(tmp_path / "whole")
    merged = mats_hub.merge([clip.part[0], tmp_path / "whole"], base=clip.base, method="average")
    found, base, own, first = (state(place) for place in (merged.folder, clip.base, tmp_path / "whole", clip.whole[0]))
    for key, value in found.items():
        torch.testing.assert_close(value, (own[key] + (first if key.startswith(SEES) else base)[key]) / 2)


def test_a_part_is_measured_and_scored_in_the_whole(clip, tmp_path):
    options = {"dataset": clip.data, "kind": ["kfac", "fisher"], "device": "cpu", "batch_size": 3}
    for number, (part, whole) in enumerate(zip(clip.part, clip.whole, strict=True)):
        found = mats_hub.compute_statistics(part, base=clip.base, output=tmp_path / f"{number}.safetensors", **options)
        expected = mats_hub.compute_statistics(whole, **options)
        assert found.provenance.task == "zero-shot-image-classification"
        assert set(found.keys()) == {key for key in expected.keys() if key.startswith(SEES)}  # noqa: SIM118
        for key in found.keys():  # noqa: SIM118
            value = expected.tensor(key)
            torch.testing.assert_close(found.tensor(key), value, rtol=1e-4, atol=1e-6 * float(value.abs().max()))
        accuracy = mats_hub.evaluate(part, base=clip.base, dataset=clip.data, device="cpu")
        assert accuracy == mats_hub.evaluate(whole, dataset=clip.data, device="cpu")
    experts = [{"model": part, "statistics": str(tmp_path / f"{n}.safetensors")} for n, part in enumerate(clip.part)]
    merged = mats_hub.merge(experts, base=clip.base, method="mats", iterations=5)
    assert {record.key.split(".")[0] for record in merged.report.solved} == {"vision_model"}
    assert (
        len(merged.report.solved) == len([key for key in state(clip.base) if key.startswith(SEES)]) - 1
    )  # class token


def test_a_part_alone_has_grams_of_its_own_modules(clip, tmp_path):
    experts = []
    for number, part in enumerate(clip.part):
        with pytest.raises(StatisticsError, match=r"has a preprocessor_config.json"):
            mats_hub.compute_statistics(part, dataset=clip.data, kind="gram", device="cpu")
        transformers.AutoImageProcessor.from_pretrained(clip.base).save_pretrained(part)
        path = tmp_path / f"{number}.safetensors"
        alone = mats_hub.compute_statistics(part, dataset=clip.data, kind="gram", device="cpu", output=path)
        assert alone.provenance.task == "image-feature-extraction"
        inside = mats_hub.compute_statistics(part, base=clip.base, dataset=clip.data, kind="gram", device="cpu")
        grams = {name.removeprefix(SEES): inside.tensor(name) for name in inside.keys()}  # noqa: SIM118
        for key in alone.keys():  # noqa: SIM118
            torch.testing.assert_close(alone.tensor(key), grams[key.removeprefix(SEES)], rtol=1e-5, atol=1e-5)
        experts.append({"model": part, "statistics": str(path)})
    merged = mats_hub.merge(experts, base=clip.base, method="regmean")
    # Its encoder of texts has linear modules of the same names.
    assert len(merged.report.solved) == 12
    assert all(record.key.startswith(SEES) for record in merged.report.solved)
    with pytest.raises(StatisticsError, match=r"has no loss here.*--kind gram.*whole model.*--base"):
        mats_hub.compute_statistics(clip.part[0], dataset=clip.data, kind="kfac", device="cpu")


def test_parts_are_compared_on_their_tasks(clip, tmp_path):
    clip.data.save_to_disk(tmp_path / "data")
    entry = {"dataset": str(tmp_path / "data"), "validation": "train", "test": "train"}
    tasks = {Path(part).name: entry for part in clip.part}
    choice = mats_hub.compare(clip.part, tasks, base=clip.base, methods=["average", "ties"], device="cpu")
    assert set(choice.experts) == set(tasks)
    assert all(set(candidate.scores) == set(tasks) for candidate in choice.candidates)


def test_a_language_model_is_a_part_of_one_that_sees(llava, tmp_path):  # noqa: F811
    folder, model, _ = llava
    experts = []
    for seed in (1, 2):
        part = transformers.LlamaForCausalLM(model.config.text_config)
        models.perturbed(part, seed).save_pretrained(tmp_path / f"text{seed}")
        experts.append(str(tmp_path / f"text{seed}"))
    merged = mats_hub.merge(experts, base=str(folder), method="average")
    first, second = (models.state(transformers.LlamaForCausalLM.from_pretrained(path)) for path in experts)
    for key, value in models.state(merged.load()).items():
        own = key.replace("model.language_model.", "model.")
        expected = (first[own] + second[own]) / 2 if own in first else model.state_dict()[key]
        torch.testing.assert_close(value, expected)
    models.tiny_bert_body(tmp_path / "bert")
    with pytest.raises(PlanError, match=r"is a bert model, but .* is a llava"):
        mats_hub.merge([str(tmp_path / "bert")], base=str(folder), method="average")
    assert mats_hub.make_plan(Recipe.build(experts, base=str(folder), method="average")).problems == []


@pytest.fixture(scope="module")
def adapters(clip, tmp_path_factory):
    """Two LoRA adapters of CLIP's encoder of images, one as older versions of transformers name its layers."""
    root = tmp_path_factory.mktemp("adapters")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    for seed in (1, 2):
        adapted = peft.get_peft_model(transformers.CLIPVisionModel.from_pretrained(clip.base), settings)
        models.shaken([p for name, p in adapted.named_parameters() if "lora_" in name], seed, 0.2)
        adapted.save_pretrained(root / f"lora{seed}")
    path = root / "lora2" / "adapter_model.safetensors"
    older = {key.replace("model.model.", f"model.model.{SEES}"): value for key, value in load_file(path).items()}
    save_file(older, path, metadata={"format": "pt"})
    return [str(root / "lora1"), str(root / "lora2")]


def merged_part(clip, adapter: str) -> dict[str, Any]:
    """Return the encoder with an adapter merged in by PEFT, as the whole names it."""
    part = transformers.CLIPVisionModel.from_pretrained(clip.base)
    mapping = {rf"^{SEES}": ""}
    merged = peft.PeftModel.from_pretrained(part, adapter, key_mapping=mapping).merge_and_unload()
    return {f"{SEES}{key}": value for key, value in models.state(merged).items()}


def test_adapters_of_a_part_change_that_part(clip, adapters, tmp_path):
    base, changed = state(clip.base), [merged_part(clip, adapter) for adapter in adapters]
    expected = base | {key: sum(one[key] for one in changed) / 2 for key in changed[0]}
    full = mats_hub.merge(adapters, method="average", format="full")
    written = mats_hub.merge(adapters, method="average", format="adapter")
    loaded = peft.PeftModel.from_pretrained(transformers.CLIPModel.from_pretrained(clip.base), written.folder)
    for found in (state(full.folder), models.state(loaded.merge_and_unload())):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    for adapter, own in zip(adapters, changed, strict=True):
        for key, value in models.state(mats_hub.load(adapter)).items():
            torch.testing.assert_close(value, own.get(key, base[key]), rtol=1e-5, atol=1e-7)


def test_adapters_of_a_part_are_measured_in_the_whole(clip, adapters, tmp_path):
    experts = []
    for number, adapter in enumerate(adapters):
        path = tmp_path / f"{number}.safetensors"
        found = mats_hub.compute_statistics(adapter, dataset=clip.data, device="cpu", output=path)
        names = {key for key in found.covers("kfac") if key.endswith(".weight")}
        layers = [f"{SEES}encoder.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"]
        assert names == {f"{name}.weight" for name in layers}
        sketch = mats_hub.compute_statistics(adapter, dataset=clip.data, device="cpu", for_adapter=True, rank=4)
        factors = load_file(f"{adapter}/adapter_model.safetensors")
        for layer in layers:
            [A] = [value for key, value in factors.items() if f"{layer.removeprefix(SEES)}.lora_A" in key]
            read = found.aliases.get(layer, layer)
            exact = A @ found.tensor(f"{read}.input_gram")
            F = sketch.tensor(f"{sketch.aliases.get(layer, layer)}.input_factor")
            torch.testing.assert_close(A @ F @ F.T, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
        experts.append({"model": adapter, "statistics": str(path)})
    merged = mats_hub.merge(experts, method="mats", iterations=3)
    assert {record.key for record in merged.report.solved} == names


def test_adapters_that_do_not_say_of_which_part_they_are_are_told_by_shapes_or_refused(clip, adapters, tmp_path):
    silent = shutil.copytree(adapters[0], tmp_path / "silent")
    options = json.loads((silent / "adapter_config.json").read_text())
    (silent / "adapter_config.json").write_text(json.dumps(options | {"auto_mapping": None}))
    with pytest.raises(
        PlanError, match=r"fits several parts .*'text_model\.encoder.*' or 'vision_model\.encoder.*base_model_class"
    ):
        mats_hub.merge([str(silent)], method="average", format="full")
    narrow = {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 36,
    }
    config = transformers.CLIPConfig.from_pretrained(clip.base)
    config.text_config = transformers.CLIPTextConfig(**narrow, max_position_embeddings=32, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "allow_other_base": True, "method": "average"}
    found = mats_hub.merge([str(silent)], format="full", **options)
    told = mats_hub.merge([adapters[0]], format="full", **options)
    expected, base = state(told.folder), state(tmp_path / "base")
    assert all(torch.equal(value, expected[key]) for key, value in state(found.folder).items())
    assert {key.split(".")[0] for key, value in expected.items() if not torch.equal(value, base[key])} == {
        "vision_model"
    }
