"""Models in folders of a Hub repository, as PEFT pushes several adapters and trainers push checkpoints."""

from __future__ import annotations

from pathlib import Path

import family as families
import models
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from test_hub import files_of, fresh_cache
from transformers import AutoModel

import mats_hub
from mats_hub.errors import CheckpointError, SourceError

EXPERTS = [f"alice/all/experts/{name}" for name in families.LABELS]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def token(hub, local):
    """Put the whole family into one repository of alice's and return her token."""
    token, files = hub.add_user("alice"), {}
    for folder, place in ((local.base, "base"), *((e, f"experts/{Path(e).name}") for e in local.experts)):
        files |= {f"{place}/{name}": data for name, data in files_of(Path(folder)).items()}
    hub.create("alice/all", files)
    return token


def test_they_are_merged_as_repositories_are(hub, token, local, tmp_path, monkeypatch):
    merged = mats_hub.merge(EXPERTS, base="alice/all/base", method="ties", output=tmp_path / "out", token=token)
    same = mats_hub.merge(local.experts, base=local.base, method="ties")
    written, expected = (load_file(made.folder / "model.safetensors") for made in (merged, same))
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    commit = hub.commits("alice/all")[0].sha
    assert [expert["model"] for expert in merged.report.recipe["experts"]] == [f"{name}@{commit}" for name in EXPERTS]
    assert [expert["name"] for expert in merged.report.experts] == list(families.LABELS)
    card = (merged.folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["alice/all"]
    assert f"[{EXPERTS[0]}](https://huggingface.co/alice/all/tree/{commit}/experts/alpha)" in card
    merged.push_to_hub("alice/merged", token=token)
    tree = mats_hub.lineage("alice/merged", token)
    assert [parent.spec for parent in tree.parents] == [f"{name}@{commit}" for name in [*EXPERTS, "alice/all/base"]]
    streamed = mats_hub.merge(EXPERTS, base="alice/all/base", method="ties", stream=True, token=token)
    assert files_of(streamed.folder)["model.safetensors"] == files_of(merged.folder)["model.safetensors"]
    assert mats_hub.replay("alice/merged", token=token).identical
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = mats_hub.merge(merged.folder / "mats_recipe.yaml")
    assert files_of(again.folder)["model.safetensors"] == files_of(merged.folder)["model.safetensors"]


def test_statistics_lie_beside_the_expert_in_its_folder(hub, token, local, tmp_path, monkeypatch):
    for name, expert in zip(families.LABELS, EXPERTS, strict=True):
        found = mats_hub.compute_statistics(
            expert, dataset=local.data(name), token=token, output=tmp_path / f"{name}.safetensors"
        )
        mats_hub.push_statistics(found.path, token=token)
        assert hub.files("alice/all")[f"experts/{name}/statistics.safetensors"] == found.path.read_bytes()
        assert f"mats-hub merge {expert} " in hub.files("alice/all")[f"experts/{name}/README.md"].decode()
    fresh_cache(monkeypatch, tmp_path / "cache")
    report = mats_hub.merge(EXPERTS, base="alice/all/base", token=token).report
    assert [expert["statistics"]["model"].partition("@")[0] for expert in report.experts] == EXPERTS


def test_a_repository_of_statistics_names_the_experts_repository(hub, token, local, tmp_path):
    found = mats_hub.compute_statistics(
        EXPERTS[0], dataset=local.data("alpha"), token=token, output=tmp_path / "a.safetensors"
    )
    mats_hub.push_statistics(found.path, "alice/statistics", token=token)
    matter = yaml.safe_load(hub.files("alice/statistics")["README.md"].decode().split("---")[1])
    assert matter["base_model"] == "alice/all"
    plan = mats_hub.make_plan(mats_hub.Recipe.build([EXPERTS[0]], base="alice/all/base"), token)
    assert plan.statistics_at["alpha"].startswith("alice/statistics@")


def test_they_are_loaded_and_scored(hub, token, local, tmp_path):
    there = mats_hub.load("alice/all/base", token=token).state_dict()
    here = AutoModel.from_pretrained(local.base).state_dict()
    assert all(torch.equal(there[name], value) for name, value in here.items())
    score = mats_hub.evaluate(EXPERTS[1], dataset=local.data("beta"), token=token)
    assert score == mats_hub.evaluate(local.experts[1], dataset=local.data("beta"))


def test_several_adapters_that_peft_saved_at_once(hub, tmp_path):
    models.tiny_llama(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("second", config)
    adapted.save_pretrained(tmp_path / "adapters")
    token = hub.add_user("alice")
    hub.create("alice/adapters", files_of(tmp_path / "adapters"))
    experts = ["alice/adapters", "alice/adapters/second"]
    merged = mats_hub.merge(experts, base=tmp_path / "base", method="average", token=token, allow_other_base=True)
    assert [expert["name"] for expert in merged.report.experts] == ["adapters", "second"]
    base = mats_hub.load(tmp_path / "base").state_dict()
    found = mats_hub.load(merged.folder, base=tmp_path / "base").state_dict()
    name = "model.layers.0.self_attn.q_proj"
    module = adapted.get_submodule(f"base_model.model.{name}")
    expected = base[f"{name}.weight"] + (module.get_delta_weight("default") + module.get_delta_weight("second")) / 2
    torch.testing.assert_close(found[f"{name}.weight"], expected)


def test_a_folder_that_is_not_there(hub, token):
    with pytest.raises(SourceError, match=r"no such folder in 'alice/all'; it has: base, experts/alpha, experts/beta"):
        mats_hub.load("alice/all/experts/delta", token=token)
    with pytest.raises(CheckpointError, match="has models in its folders; name one: alice/all/base"):
        mats_hub.load("alice/all", token=token)
    for spec in ("alice/all/../base", "alice/all//base", "alice/all/base/", "alice/all/.git"):
        with pytest.raises(SourceError, match="neither a folder on this machine nor a Hub id"):
            mats_hub.load(spec, token=token)
