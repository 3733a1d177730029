"""The card: metadata by the Hub's rules, text from which the merge can be repeated, nothing that is not so."""

from __future__ import annotations

import copy
from pathlib import Path

import family as families
import pytest
import torch
import yaml
from hub_server import validate_card
from safetensors.torch import save_file

import mats_hub
from mats_hub.card import front_matter, render_card
from mats_hub.report import MergeReport

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    family = families.make_family(tmp_path_factory.mktemp("family"))
    for expert in family.experts:
        mats_hub.compute_statistics(
            expert, dataset=family.data(Path(expert).name), output=Path(expert) / "statistics.safetensors"
        )
    return mats_hub.merge(family.experts, base=family.base, method="mats", iterations=4)


@pytest.fixture
def report(merged) -> MergeReport:
    """Return the report as if the models had come from the Hub."""
    report = copy.deepcopy(merged.report)
    for facts in [report.base, *report.experts]:
        facts.update(repo_id=f"owner/{facts['model'].split('@')[0]}", commit=SHA, license="mit")
    return report


def parsed(text: str) -> dict:
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def test_the_metadata_satisfies_the_hub(report):
    text = render_card(report, repo_id="owner/merged")
    assert validate_card(text) == ([], [])
    front = parsed(text)
    assert front["base_model"] == ["owner/alpha", "owner/beta", "owner/gamma"]
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-classification"
    assert {"merge", "mats", "mats_hub"} <= set(front["tags"])
    assert front["license"] == "mit"
    assert "model-index" not in front


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["mit"] * 4, "mit"),
        (["mit", "mit", "apache-2.0", "mit"], "other"),
        ([None] * 4, None),
        (["mit", None, None, None], "other"),
    ],
)
def test_a_licence_only_when_all_parents_agree(report, licenses, expected):
    for facts, license_id in zip([report.base, *report.experts], licenses, strict=True):
        facts["license"] = license_id
    text = render_card(report)
    assert parsed(text).get("license") == expected
    assert ("licences differ" in text) == (expected == "other")


def test_local_parents_are_no_base_models(merged):
    text = (merged.folder / "README.md").read_text()
    front = parsed(text)
    assert "base_model" not in front
    assert "base_model_relation" not in front
    assert validate_card(text) == ([], [])
    assert "alpha (a local folder)" in text


def test_the_same_parent_twice_is_named_once(report):
    report.experts[1]["repo_id"] = "owner/alpha"
    assert front_matter(report)["base_model"] == ["owner/alpha", "owner/gamma"]


def test_results_go_into_table_index_and_figure(merged, tmp_path):
    merged.save(tmp_path / "copy")
    mine = mats_hub.MergedModel.open(tmp_path / "copy")
    mine.add_results(
        [
            {"task": "alpha", "metric": "accuracy", "model": "merged", "value": 0.75, "dataset": "owner/alpha-data"},
            {"task": "alpha", "metric": "accuracy", "model": "expert", "value": 0.875},
        ]
    )
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "| alpha | accuracy | 0.750 | 0.875 |" in text
    index = parsed(text)["model-index"][0]["results"]
    assert [row["metrics"] for row in index] == [[{"type": "accuracy", "value": 0.75}]]
    assert validate_card(text) == ([], [])
    assert (tmp_path / "copy" / "figures" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert mats_hub.MergedModel.open(tmp_path / "copy").report.results == mine.report.results


def test_the_text_says_what_was_done(merged, report):
    text = (merged.folder / "README.md").read_text()
    recipe = mats_hub.Recipe.from_mapping(merged.report.recipe)
    assert recipe.to_yaml().strip() in text
    assert "conjugate gradient, 4 iterations" in text
    assert "https://arxiv.org/abs/2312.04339" in text
    assert "| alpha | kfac |" in text
    for name, digest in merged.report.files.items():
        assert f"| `{name}` | `{digest}` |" in text
    assert "figures/convergence.png" in text
    assert (merged.folder / "figures" / "convergence.png").exists()
    assert "kept for task **beta**" in text
    assert text.count(SHA) == 0
    assert render_card(report).count(SHA) == 4
    assert "{{" not in text
    assert "\n\n\n" not in text.split("```")[0]


def test_hostile_names_stay_text(report):
    report.experts[0]["name"] = "<img src=x onerror=alert(1)> | [x](javascript:1) *b* $x$"
    report.notes.append("<script>alert(1)</script>\n# heading")
    text = render_card(report)
    body = "".join(text.split("\n---\n", 1)[1].split("```")[::2])  # inside a fence nothing is markup
    assert "<img" not in body
    assert "<script" not in body
    assert "\n# heading" not in body
    assert validate_card(text)[0] == []


def test_a_model_without_heads_is_loaded_by_its_own_class(report):
    for expert in report.experts:
        expert["kept"] = []
    assert "BertForSequenceClassification.from_pretrained('owner/merged')" in render_card(
        report, repo_id="owner/merged"
    )


def test_what_is_no_model_of_transformers_is_not_said_to_be_one(tmp_path):
    values = {"blocks.0.attn.qkv.weight": torch.arange(6.0).reshape(3, 2)}
    for name in ("base", "one", "other"):
        (tmp_path / name).mkdir()
        save_file(values, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 3}')
        (tmp_path / name / "README.md").write_text("---\nlibrary_name: timm\n---\n")
    report = mats_hub.merge([tmp_path / "one", tmp_path / "other"], base=tmp_path / "base", method="ties").report
    assert front_matter(report)["library_name"] == "timm"
    assert "load_file('path/to/this/folder/model.safetensors')" in render_card(report)
    assert "load_file(hf_hub_download('owner/merged', 'model.safetensors'))" in render_card(
        report, repo_id="owner/merged"
    )
    assert "transformers import" not in render_card(report)
