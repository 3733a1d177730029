"""The Hub: models opened by id and pinned, a merge pushed in one commit, opened again from an empty cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import family as families
import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

import mats_hub
from mats_hub.errors import CheckpointError, HubError, MatsError, PlanError, SourceError
from mats_hub.hub_id import from_address
from mats_hub.recipe import Recipe
from mats_hub.source import open_source

CARD = "---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: text-classification\n---\n# an expert\n"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    made = families.make_family(tmp_path_factory.mktemp("family"), card=CARD)
    (Path(made.base) / "README.md").write_text(CARD)
    return made


@pytest.fixture
def published(hub, local):
    """Put the family on the Hub as alice's and return her token."""
    token = families.publish(hub, local)
    return token


EXPERTS = [f"alice/{name}" for name in families.LABELS]


def fresh_cache(monkeypatch, folder):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_push_and_open_again_is_bit_identical(hub, published, tmp_path, monkeypatch):
    merged = mats_hub.merge(EXPERTS, base="alice/base", method="ties", output=tmp_path / "out", token=published)
    before = len(hub.commits("alice/merged")) if hub.find("alice/merged") else 0
    url = merged.push_to_hub("alice/merged", token=published)
    commits = hub.commits("alice/merged")
    assert before == 0
    assert len(commits) == 2  # the one that creates the repository, and ours
    assert commits[0].sha in url
    there = {name: data for name, data in hub.files("alice/merged").items() if name != ".gitattributes"}
    here = files_of(tmp_path / "out")
    assert there.keys() == here.keys()
    assert {name for name in here if here[name] != there[name]} == {"README.md"}  # which now names the repository

    fresh_cache(monkeypatch, tmp_path / "cache")
    for task in families.LABELS:
        from_hub = mats_hub.load("alice/merged", task=task).state_dict()
        from_disk = mats_hub.load(tmp_path / "out", task=task).state_dict()
        assert all(torch.equal(value, from_disk[name]) for name, value in from_hub.items())
    body = AutoModel.from_pretrained("alice/merged").state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(body[name], value) for name, value in written.items())


def test_the_card_on_the_hub_names_parents_licence_and_commits(hub, published, tmp_path):
    merged = mats_hub.merge(EXPERTS, base="alice/base", method="average", token=published)
    merged.push_to_hub("alice/merged", token=published, private=True)
    info = huggingface_hub.HfApi(token=published).model_info("alice/merged")
    assert info.private
    assert {f"base_model:merge:{name}" for name in EXPERTS} <= set(info.tags)
    text = hub.files("alice/merged")["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == EXPERTS
    assert front["base_model_relation"] == "merge"
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-classification"
    assert "mats_hub.load('alice/merged', task='alpha')" in text
    for name in EXPERTS:
        assert hub.commits(name)[0].sha in text
    recipe = mats_hub.Recipe.from_yaml(hub.files("alice/merged")["mats_recipe.yaml"].decode())
    assert recipe.experts[0].model == f"alice/alpha@{hub.commits('alice/alpha')[0].sha}"


def test_revisions_are_pinned_and_a_later_commit_changes_nothing(hub, published, tmp_path):
    first = mats_hub.merge(EXPERTS, base="alice/base", method="average", output=tmp_path / "first", token=published)
    pinned = hub.commits("alice/alpha")[0].sha
    hub.commit("alice/alpha", {"model.safetensors": hub.files("alice/beta")["model.safetensors"]})
    with pytest.raises(CheckpointError, match="cannot be loaded as BertForSequenceClassification"):
        mats_hub.load("alice/alpha")  # today's alpha has another head than its config says
    again = mats_hub.merge(tmp_path / "first" / "mats_recipe.yaml", output=tmp_path / "again", token=published)
    assert again.report.files == first.report.files
    assert again.report.experts[0]["commit"] == pinned


def test_the_plan_fetches_headers_not_weights(hub, published):
    sizes = {name: len(hub.files(name)["model.safetensors"]) for name in [*EXPERTS, "alice/base"]}
    plan = mats_hub.make_plan(mats_hub.Recipe.build(EXPERTS, base="alice/base", method="average"), token=published)
    assert not plan.problems
    assert plan.bytes_to_fetch == sum(sizes.values())
    ranged = [seen for seen in hub.requests if "model.safetensors" in seen.path and seen.method == "GET"]
    assert ranged
    assert all("range" in seen.headers for seen in ranged)


def test_statistics_are_found_in_the_expert_repository(hub, published, local, tmp_path):
    for name in families.LABELS:
        made = mats_hub.compute_statistics(
            local.root / name, dataset=local.data(name), output=tmp_path / f"{name}.safetensors"
        )
        hub.commit(f"alice/{name}", {"statistics.safetensors": made.path.read_bytes()})
    report = mats_hub.merge(EXPERTS, base="alice/base", token=published).report
    assert report.recipe["method"] == "mats"  # measured on the folder, accepted for the same weights on the Hub
    hub.commit("alice/beta", {"model.safetensors": hub.files("alice/alpha")["model.safetensors"]})
    with pytest.raises(PlanError, match=r"expert 'beta' is alice/beta@\w+ \(weights .*measured on beta"):
        mats_hub.merge(EXPERTS, base="alice/base", token=published)


def test_a_card_edited_by_hand_is_pushed_as_it_is_and_a_bad_one_is_refused(hub, published, tmp_path):
    merged = mats_hub.merge(EXPERTS, base="alice/base", method="average", output=tmp_path / "out", token=published)
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    merged.push_to_hub("alice/merged", token=published)
    assert hub.files("alice/merged")["README.md"].decode().endswith("My own words.\n")
    card.write_text(card.read_text().replace("base_model_relation: merge", "base_model_relation: marriage"))
    with pytest.raises(HubError, match="the Hub refuses the model card"):
        merged.push_to_hub("alice/other", token=published)
    assert hub.find("alice/other") is None  # refused before anything was made


def test_pushing_needs_rights_and_never_deletes(hub, published, tmp_path):
    merged = mats_hub.merge(EXPERTS, base="alice/base", method="average", token=published)
    bob = hub.add_user("bob")
    with pytest.raises(HubError, match="alice/merged"):
        merged.push_to_hub("alice/merged", token=bob)
    hub.create("alice/old", {"notes.txt": b"keep me"})
    merged.push_to_hub("alice/old", token=published)
    assert hub.files("alice/old")["notes.txt"] == b"keep me"
    with pytest.raises(HubError, match="is no Hub id"):
        merged.push_to_hub("../alice/x", token=published)
    assert not hub.seen(method="DELETE")


def test_a_pull_request_leaves_main_alone(hub, published):
    merged = mats_hub.merge(EXPERTS, base="alice/base", method="average", token=published)
    hub.create("alice/target", {"notes.txt": b"x"})
    url = merged.push_to_hub("alice/target", token=published, create_pr=True)
    assert "/discussions/" in url
    assert "model.safetensors" not in hub.files("alice/target")
    assert "model.safetensors" in hub.files("alice/target", revision="refs/pr/1")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("alice/nothing", "is not on the Hub, or is private"),
        ("alice/alpha@0000000000000000000000000000000000000000", "not that revision"),
        ("alice/hidden", "is not on the Hub, or is private"),
        ("alice/alpha\n", "neither a folder"),
        ("/etc/passwd", "neither a folder on this machine nor a Hub id"),
        ("https://example.com/model", "neither a folder"),
        ("../nowhere/at/all", "neither a folder"),
        ("alice/alpha/../base", "neither a folder"),
    ],
)
def test_ids_that_lead_nowhere(hub, published, spec, message):
    hub.create("alice/hidden", {"config.json": b"{}"}, private=True)
    with pytest.raises(SourceError, match=message):
        open_source(spec, token=False)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/alice/alpha", "alice/alpha"),
        ("https://huggingface.co/alice/alpha/tree/main", "alice/alpha"),
        ("https://huggingface.co/alice/alpha/tree/0c1d/checkpoint-500/a?not-for-all-audiences=true#top", None),
        ("https://huggingface.co/alice/alpha/tree/refs%2Fpr%2F1", "alice/alpha@refs/pr/1"),
        ("https://huggingface.co/alice/alpha/blob/main/sub/config.json", "alice/alpha/sub"),
        ("https://huggingface.co/alice/alpha/resolve/v1/model.safetensors?download=true", "alice/alpha@v1"),
        ("https://huggingface.co/alice/alpha/commit/0c1d", "alice/alpha@0c1d"),
        ("https://huggingface.co/alice/alpha/discussions/3", "alice/alpha"),
        ("https://huggingface.co/gpt2/tree/main/onnx", "gpt2/onnx"),
        ("http://www.huggingface.co/gpt2/", "gpt2"),
        ("https://huggingface.co/alice/alpha.git", "alice/alpha"),
        ("huggingface.co/alice/alpha", "alice/alpha"),
        ("hf.co/alice/alpha", "alice/alpha"),
        ("https://huggingface.co/datasets/alice/data/viewer/default/train", "alice/data"),
        ("https://huggingface.co/", ""),
        ("https://huggingface.co/alice/alpha/else", ""),
        ("ftp://huggingface.co/alice/alpha", ""),
        ("https://huggingface.co.example.com/alice/alpha", ""),
        ("https://example.com/huggingface.co/alice/alpha", ""),
        ("alice/alpha@v1", ""),
    ],
)
def test_an_address_copied_from_a_browser_is_an_id(address, name):
    assert from_address(address) == ("alice/alpha/checkpoint-500/a@0c1d" if name is None else name or address)


def test_addresses_serve_wherever_ids_do(hub, published, local):
    page = f"{huggingface_hub.constants.ENDPOINT}/alice/"
    hub.create("alice/data", {"validation.jsonl": local.data("alpha").read_bytes()}, repo_type="dataset")
    experts = [f"{page}alpha/tree/main", {"model": f"{page}beta", "name": "b"}]
    merged = mats_hub.merge(experts, base=f"{page}base", method="ties", token=published)
    assert [(expert["repo_id"], expert["name"]) for expert in merged.report.experts] == [
        ("alice/alpha", "alpha"),
        ("alice/beta", "b"),
    ]
    data = f"{huggingface_hub.constants.ENDPOINT}/datasets/alice/data"
    found = mats_hub.compute_statistics(f"{page}alpha", dataset=data, kind="gram", token=published)
    assert found.provenance.dataset == "alice/data"


def test_a_gated_expert_says_what_to_do(hub, published, local):
    hub.create("alice/gated", {p.name: p.read_bytes() for p in Path(local.experts[0]).iterdir()}, gated=True)
    bob = hub.add_user("bob")
    with pytest.raises(MatsError, match=r"'alice/gated' is gated: accept its terms"):
        mats_hub.merge(["alice/gated", "alice/beta"], base="alice/base", method="average", token=bob)


def test_no_network_is_said_plainly(hub, published, monkeypatch):
    hub.fault("drop", path="/api/models/alice/alpha", times=None)
    with pytest.raises(SourceError, match=r"cannot reach the Hub .* HF_ENDPOINT"):
        open_source("alice/alpha")


def test_offline_uses_the_cache_or_says_so(hub, published, monkeypatch, tmp_path):
    huggingface_hub.snapshot_download("alice/alpha", token=published)
    huggingface_hub.snapshot_download("alice/base", token=published)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    merged = mats_hub.merge(["alice/alpha"], base="alice/base", method="average")
    assert merged.report.experts[0]["commit"] == hub.commits("alice/alpha")[0].sha
    assert not hub.requests
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        open_source("alice/beta")


def test_a_merge_is_repeated_offline_by_the_same_names(hub, published, monkeypatch, tmp_path):
    fresh_cache(monkeypatch, tmp_path / "cache")
    huggingface_hub.create_branch("alice/beta", branch="draft", token=published)
    hub.commit("alice/beta", {"notes.txt": b"later"}, branch="draft")
    names = ["alice/alpha", "alice/beta@draft"]
    first = mats_hub.merge(names, base="alice/base", method="average", token=published)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    again = mats_hub.merge(names, base="alice/base", method="average")
    assert not hub.requests
    assert again.report.files == first.report.files
    assert again.report.recipe == first.report.recipe


def test_a_local_folder_wins_over_an_id_of_the_same_name(hub, published, local, tmp_path, monkeypatch):
    shutil.copytree(local.experts[0], tmp_path / "alice" / "alpha")
    monkeypatch.chdir(tmp_path)
    assert open_source("alice/alpha").repo_id is None


def test_statistics_on_a_data_set_of_the_hub_are_pinned(hub, published, local):
    sha = hub.create("alice/data", {"validation.jsonl": local.data("alpha").read_bytes()}, repo_type="dataset")
    found = mats_hub.compute_statistics(
        "alice/alpha", dataset="alice/data", split="validation", kind="gram", token=published
    )
    assert (found.provenance.dataset, found.provenance.dataset_commit) == ("alice/data", sha)
    assert found.provenance.model == f"alice/alpha@{hub.commits('alice/alpha')[0].sha}"
    by_file = mats_hub.compute_statistics(local.root / "alpha", dataset=local.data("alpha"), kind="gram")
    assert all(torch.equal(found.tensor(key), by_file.tensor(key)) for key in by_file.keys())  # noqa: SIM118
    with pytest.raises(SourceError, match=r"alice/nodata.*not on the Hub"):
        mats_hub.compute_statistics("alice/alpha", dataset="alice/nodata", kind="gram", token=published)
    with pytest.raises(SourceError, match=r"alice/data.*cannot be read"):
        mats_hub.compute_statistics("alice/alpha", dataset="alice/data", split="nosplit", kind="gram", token=published)


def test_results_on_a_registered_benchmark_get_a_file_of_their_own(hub, local):
    token = hub.add_user("alice")
    hub.create("alice/bench", {"eval.yaml": b"name: bench\ntasks:\n- id: hard\n"}, repo_type="dataset")
    hub.create("alice/plain", {"data.jsonl": b"{}"}, repo_type="dataset")
    merged = mats_hub.merge(local.experts, base=local.base, method="average")
    row = {"task": "alpha", "metric": "accuracy", "model": "merged", "value": 0.5}
    merged.add_results(
        [
            {**row, "dataset": "alice/bench", "task_id": "hard"},
            {**row, "dataset": "alice/bench", "task_id": "unknown"},
            {**row, "dataset": "alice/plain", "task_id": "hard"},
            {**row, "dataset": "alice/missing", "task_id": "hard"},
            {**row, "dataset": "alice/bench", "task_id": "hard", "model": "alpha"},
            {**row, "dataset": "alice/plain"},
        ]
    )
    merged.push_to_hub("alice/merged", token=token)
    files = hub.files("alice/merged")
    assert [name for name in files if name.startswith(".eval_results")] == [".eval_results/alice--bench.yaml"]
    held = yaml.safe_load(files[".eval_results/alice--bench.yaml"])
    assert held == [{"dataset": {"id": "alice/bench", "task_id": "hard"}, "value": 0.5}]
    assert len(yaml.safe_load(files["README.md"].decode().split("---")[1])["model-index"][0]["results"]) == 5


def test_a_merged_model_is_opened_saved_and_pushed_as_others_are(hub, local, tmp_path):
    token = hub.add_user("alice")
    merged = mats_hub.merge(local.experts, base=local.base, method="average")
    merged.push_to_hub("alice/merged", token=token)
    commit = hub.commits("alice/merged")[0].sha
    hub.commit("alice/merged", {"later.txt": b"later"})
    opened = mats_hub.MergedModel.from_pretrained("alice/merged", revision=commit, token=token)
    assert opened.report.files == merged.report.files
    assert not (opened.folder / "later.txt").exists()
    saved = opened.save_pretrained(tmp_path / "saved")
    assert mats_hub.MergedModel.from_pretrained(saved).load("alpha").config.num_labels == 2
    assert not any(path.is_symlink() for path in saved.rglob("*"))


def test_the_base_that_the_experts_cards_name_is_told_and_not_taken(hub, published, local):
    card = "---\nbase_model:\n- alice/base\n---\n"
    for name in ("alpha", "beta"):
        hub.commit(f"alice/{name}", {"README.md": card})
    names = ["alice/alpha", "alice/beta"]
    told = "no base was given; the experts' cards name 'alice/base', which methods of task vectors need (--base)"
    plan = mats_hub.make_plan(Recipe.build(names, method="average"), published)
    assert plan.base is None
    assert told in plan.notes
    with pytest.raises(PlanError, match=r"name it with 'base' \(--base alice/base, as their cards do\)"):
        mats_hub.merge(names, method="ties", token=published)
    hub.commit("alice/beta", {"README.md": "---\nbase_model: alice/other\n---\n"})
    assert told not in mats_hub.make_plan(Recipe.build(names, method="average"), published).notes
