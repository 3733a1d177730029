"""Experts compressed into masks of one multi-task vector, and given back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import family as families
import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mats_hub
from mats_hub.cli import main
from mats_hub.errors import CheckpointError, IncompatibleExperts, MatsError, OutputError, RecipeError, SourceError
from mats_hub.initialization.consensus import task_mask
from mats_hub.localize import Packer, pack, unpack


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=families.EXPERT_CARD)


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.lists(st.booleans(), max_size=30), max_size=6))
def test_bits_are_packed_as_numpy_packs_them_in_any_parts(parts):
    whole = [bit for part in parts for bit in part]
    packer = Packer()
    content = b"".join(packer.add(torch.tensor(part, dtype=torch.bool)) for part in parts) + packer.end()
    assert (
        content
        == np.packbits(np.array(whole, dtype=bool)).tobytes()
        == pack(torch.tensor(whole, dtype=torch.bool)).numpy().tobytes()
    )
    assert (
        unpack(
            torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else pack(torch.zeros(0)), len(whole)
        ).tolist()
        == whole
    )
    assert (packer.count, packer.kept) == (len(whole), sum(whole))
    with pytest.raises(ValueError, match="do not hold"):
        unpack(torch.zeros(1, dtype=torch.uint8), 9)


@pytest.mark.parametrize("vector", ["task_arithmetic", "ties"])
def test_an_expert_is_its_base_and_its_mask_of_the_vector(local, tmp_path, vector):
    made = mats_hub.compress(local.experts, base=local.base, output=tmp_path / "bundle", vector=vector, mask_scale=0.3)
    base = load_file(Path(local.base, "model.safetensors"))
    vectors = load_file(made.folder / "multi_task_vector.safetensors")
    assert vectors.keys() <= base.keys()
    for name, folder in zip(families.LABELS, local.experts, strict=True):
        expert, model = load_file(Path(folder, "model.safetensors")), mats_hub.load(made.folder, name, base=local.base)
        rebuilt = model.state_dict()
        for key, merged in vectors.items():
            delta = expert[f"bert.{key}"] - base[key]
            if vector == "task_arithmetic":
                total = sum(load_file(Path(e, "model.safetensors"))[f"bert.{key}"] - base[key] for e in local.experts)
                torch.testing.assert_close(merged, total)
            expected = base[key] + torch.where(task_mask(delta, merged, 0.3), merged, 0)
            torch.testing.assert_close(rebuilt[f"bert.{key}"], expected)
        assert torch.equal(rebuilt["classifier.weight"], expert["classifier.weight"])
        assert model.config.id2label == {i: f"{name}-{i}" for i in range(families.LABELS[name])}
    facts = made.report.bundle
    assert facts["full_bytes"] > 2 * facts["bytes"]
    assert 0 < facts["tasks"]["alpha"]["kept"] < 1


def test_one_expert_is_rebuilt_exactly(local, tmp_path):
    made = mats_hub.compress(local.experts[:1], base=local.base, output=tmp_path / "bundle")
    rebuilt = mats_hub.load(made.folder, "alpha", base=local.base).state_dict()
    for key, value in mats_hub.load(local.experts[0]).state_dict().items():
        torch.testing.assert_close(rebuilt[key], value)


def test_masks_are_chosen_on_validation_data(local, tmp_path):
    tasks = {name: {"validation": str(local.data(name)), "test": "none.jsonl"} for name in list(families.LABELS)[:2]}
    made = mats_hub.compress(local.experts, base=local.base, output=tmp_path / "bundle", tasks=tasks, mask_scale=0.5)
    chosen = {name: task["mask_scale"] for name, task in made.report.bundle["tasks"].items()}
    assert chosen["gamma"] == 0.5
    for name in ("beta",):
        scores = {}
        for scale in (0.2, 0.3, 0.4, 0.5, 0.6):
            folder = tmp_path / f"{name}-{scale}"
            mats_hub.compress(local.experts, base=local.base, output=folder, mask_scale={name: scale})
            model = mats_hub.load(folder, name, base=local.base)
            scores[scale] = mats_hub.evaluate(model, dataset=str(local.data(name)), processor=local.base)
        assert chosen[name] == max(scores, key=scores.__getitem__)
    assert not list((tmp_path / "bundle").rglob("mask-*"))


@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_t5, models.tiny_gpt2])
def test_other_architectures_and_tied_weights(tmp_path, make):
    base = make()
    kind = {"tiny_llama": "llama", "tiny_t5": "t5", "tiny_gpt2": "gpt2"}[make.__name__]
    models.save(base, tmp_path / "base", kind)
    for seed in (1, 2):
        models.save(models.perturbed(base, seed), tmp_path / f"expert{seed}", kind)
    experts = [str(tmp_path / f"expert{seed}") for seed in (1, 2)]
    made = mats_hub.compress(experts, base=str(tmp_path / "base"), output=tmp_path / "bundle", mask_scale=1e-6)
    model = mats_hub.load(made.folder, "expert1", base=tmp_path / "base")
    assert type(model) is type(base)
    vector = load_file(made.folder / "multi_task_vector.safetensors")
    ours, start = model.state_dict(), base.state_dict()
    assert all(torch.isfinite(value).all() for value in ours.values())
    moved = [key for key in vector if key in ours and not torch.equal(ours[key], start[key])]
    assert moved


def test_adapters_are_compressed_too_and_extracted_as_checkpoints(local, tmp_path, capsys):
    adapters = []
    for seed, name in enumerate(families.LABELS):
        models.lora_adapter(Path(local.base), tmp_path / name, seed=seed, labels=families.LABELS[name])
        adapters.append(str(tmp_path / name))
    bundle, target = tmp_path / "bundle", tmp_path / "beta-again"
    assert main(["compress", *adapters, "--base", local.base, "--output", str(bundle), "--mask-scale", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "beta: λ 0.2" in out
    assert "as full checkpoints" in out
    assert main(["extract", str(bundle), "--task", "beta", "--base", local.base, "--output", str(target)]) == 0
    extracted, loaded = mats_hub.load(target), mats_hub.load(bundle, "beta", base=local.base)
    assert all(
        torch.equal(a, b) for a, b in zip(extracted.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert (target / "tokenizer.json").is_file()


def test_a_bundle_on_the_hub_is_loaded_by_the_files_it_needs(hub, local, tmp_path, monkeypatch, capsys):
    token = families.publish(hub, local)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    experts = [f"alice/{name}" for name in families.LABELS]
    flags = ["--base", "alice/base", "--output", str(tmp_path / "bundle"), "--push", "alice/three-in-one"]
    assert main(["compress", *experts, *flags]) == 0
    card = hub.files("alice/three-in-one")["README.md"].decode()
    assert "library_name: mats_hub" in card
    assert "compressed into this repository" in card
    assert "base_model:\n- alice/alpha" in card
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    model = mats_hub.load("alice/three-in-one", "beta", token=token)
    assert model.config.num_labels == 3
    fetched = {s.path.rsplit("/", 1)[-1] for s in hub.seen("/resolve/") if "three-in-one" in s.path}
    assert "multi_task_vector.safetensors" in fetched
    assert {s.path.split("/")[-2] for s in hub.seen("mask.bin")} == {"beta"}
    with pytest.raises(SourceError, match=r"unknown task 'bet'. Did you mean 'beta'"):
        mats_hub.load("alice/three-in-one", "bet", token=token)
    with pytest.raises(SourceError, match="holds compressed experts"):
        mats_hub.replay("alice/three-in-one", token=token)


def test_what_does_not_belong_together_is_refused(local, tmp_path):
    made = mats_hub.compress(local.experts, base=local.base, output=tmp_path / "bundle")
    other = families.make_family(tmp_path / "other", first=9)
    with pytest.raises(IncompatibleExperts, match="was made on a base with fingerprint"):
        mats_hub.load(made.folder, "alpha", base=other.base)
    with pytest.raises(SourceError, match="name it with 'base'"):
        mats_hub.load(made.folder, "alpha")
    with pytest.raises(SourceError, match="name a task: alpha, beta, gamma"):
        mats_hub.load(made.folder, base=local.base)
    with pytest.raises(RecipeError, match="'task_arithmetic' or 'ties', not 'dare'"):
        mats_hub.compress(local.experts, base=local.base, output=tmp_path / "x", vector="dare")
    with pytest.raises(RecipeError, match="larger than 0"):
        mats_hub.compress(local.experts, base=local.base, output=tmp_path / "x", mask_scale=0)
    with pytest.raises(OutputError, match="not an empty folder"):
        mats_hub.compress(local.experts, base=local.base, output=tmp_path / "bundle")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["mask", "cut mask", "vector", "missing field", "count", "names", "task"])
def test_damaged_bundles_are_refused(local, tmp_path, damage):
    made = mats_hub.compress(local.experts, base=local.base, output=tmp_path / "bundle")
    folder, index = made.folder, made.folder / "mats_bundle.json"
    content = json.loads(index.read_text())
    mask = folder / "tasks/alpha/mask.bin"
    if damage == "mask":
        mask.write_bytes(bytes([mask.read_bytes()[0] ^ 1]) + mask.read_bytes()[1:])
    elif damage == "cut mask":
        mask.write_bytes(mask.read_bytes()[:-5])
    elif damage == "vector":
        with (folder / "multi_task_vector.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
    elif damage == "missing field":
        content.pop("vector")
    elif damage == "count":
        content["tasks"]["alpha"]["count"] += 10**6
    elif damage == "names":
        content["names"] = [*content["names"][:-1], "elsewhere"]
    else:
        content["tasks"] = 3
    index.write_text(json.dumps(content))
    with pytest.raises(MatsError) as refused:
        mats_hub.load(folder, "alpha", base=local.base)
    assert isinstance(refused.value, CheckpointError)


def test_nothing_is_left_when_compressing_fails(local, tmp_path, monkeypatch):
    shutil.copytree(local.root, tmp_path / "copy")
    copy = families.Family(tmp_path / "copy")
    tensors = load_file(Path(copy.experts[2], "model.safetensors"))
    tensors["bert.encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    models_path = Path(copy.experts[2], "model.safetensors")
    from safetensors.torch import save_file

    save_file(tensors, models_path, {"format": "pt"})
    with pytest.raises(MatsError, match="NaN"):
        mats_hub.compress(copy.experts, base=copy.base, output=tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []
