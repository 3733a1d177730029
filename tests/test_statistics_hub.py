"""Statistics on the Hub: pushed beside their expert or into a repository of their own, and found by a merge."""

from __future__ import annotations

from pathlib import Path

import family as families
import huggingface_hub
import pytest
from hub_server import validate_card
from test_hub import CARD, EXPERTS, fresh_cache

import mats_hub
from mats_hub.cli import main
from mats_hub.errors import HubError, PlanError, StatisticsMismatch
from mats_hub.statistics import Statistics


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=CARD)


@pytest.fixture
def token(hub, local):
    """Put the family on the Hub as alice's and return her token."""
    token = families.publish(hub, local)
    return token


def measured(local, name: str, folder: Path, token: str, **options) -> Path:
    found = mats_hub.compute_statistics(
        f"alice/{name}", dataset=local.data(name), token=token, output=folder / f"{name}.safetensors", **options
    )
    return found.path


def test_pushed_beside_the_experts_they_are_found_by_a_merge(hub, token, local, tmp_path, monkeypatch):
    for name in families.LABELS:
        before = hub.files(f"alice/{name}")["model.safetensors"]
        url = mats_hub.push_statistics(measured(local, name, tmp_path, token), token=token)
        assert hub.commits(f"alice/{name}")[0].sha in url
        files = hub.files(f"alice/{name}")
        assert files["model.safetensors"] == before
        assert files["statistics.safetensors"] == (tmp_path / f"{name}.safetensors").read_bytes()
        text = files["README.md"].decode()
        assert text.startswith(CARD.rstrip())
        assert "They hold no example" in text
        assert str(tmp_path) not in text
        assert validate_card(text) == ([], [])
    fresh_cache(monkeypatch, tmp_path / "cache")
    report = mats_hub.merge(EXPERTS, base="alice/base", token=token).report
    assert report.recipe["method"] == "mats"
    assert all(expert["statistics"]["model"].startswith(expert["repo_id"]) for expert in report.experts)


def test_pushed_again_the_card_has_one_section(hub, token, local, tmp_path):
    for kind in ("gram", "kfac"):
        mats_hub.push_statistics(measured(local, "alpha", tmp_path, token, kind=kind), token=token)
    text = hub.files("alice/alpha")["README.md"].decode()
    assert text.count("## Statistics for merging") == 1
    assert "| kinds | kfac |" in text


def test_somebody_elses_repository_gets_a_pull_request(hub, token, local, tmp_path):
    bob = hub.add_user("bob")
    file = measured(local, "alpha", tmp_path, bob)
    before = hub.commits("alice/alpha")[0].sha
    url = mats_hub.push_statistics(file, token=bob)
    assert url.endswith("/discussions/1")
    assert hub.commits("alice/alpha")[0].sha == before
    assert "statistics.safetensors" not in hub.files("alice/alpha")
    assert mats_hub.push_statistics(file, token=token, create_pr=True).endswith("/discussions/2")


def test_statistics_of_other_weights_are_refused_and_nothing_is_sent(hub, token, local, tmp_path):
    file = measured(local, "alpha", tmp_path, token)
    hub.commit("alice/alpha", {"model.safetensors": hub.files("alice/beta")["model.safetensors"]})
    before = hub.commits("alice/alpha")[0].sha
    for target in (None, "alice/alpha", "alice/beta"):
        with pytest.raises(StatisticsMismatch, match=r"measured on alice/alpha@\w+"):
            mats_hub.push_statistics(file, target, token=token)
    assert hub.commits("alice/alpha")[0].sha == before


def test_a_repository_of_their_own_is_found_by_the_weights_it_names(hub, token, local, tmp_path, monkeypatch):
    bob = hub.add_user("bob")
    for name in families.LABELS:
        mats_hub.push_statistics(measured(local, name, tmp_path, bob), f"bob/{name}-statistics", token=bob)
        text = hub.files(f"bob/{name}-statistics")["README.md"].decode()
        assert validate_card(text)[0] == []
        assert f"base_model: alice/{name}" in text
    hub.create("bob/stale", {"README.md": f"---\nbase_model: alice/alpha\ntags: [mats_statistics]\nmats_statistics:\n"
                             f"  fingerprint: {'0' * 64}\n---\n".encode()})  # fmt: skip
    hub.find("bob/stale").likes = 100
    fresh_cache(monkeypatch, tmp_path / "cache")
    plan = mats_hub.make_plan(mats_hub.Recipe.build(EXPERTS, base="alice/base"), token)
    plan.raise_problems()
    assert plan.recipe.method == "mats"
    assert any("statistics of expert 'alpha' are those in bob/alpha-statistics@" in note for note in plan.notes)
    merged = mats_hub.merge(EXPERTS, base="alice/base", token=token)
    assert merged.report.solved
    hub.commit("alice/alpha", {"model.safetensors": hub.files("alice/beta")["model.safetensors"]})
    with pytest.raises(PlanError, match="expert 'alpha' has no statistics"):
        mats_hub.merge(EXPERTS, base="alice/base", method="mats", token=token)


def test_several_files_are_pushed_under_the_names_that_are_looked_for(hub, token, local, tmp_path, monkeypatch):
    for name in families.LABELS:
        whole = Statistics.load(measured(local, name, tmp_path, token))
        index = whole.save(tmp_path / "parts" / f"my-{name}.safetensors", "float16", max_shard_bytes=2_000)
        assert len(Statistics.load(index).files) > 3
        mats_hub.push_statistics(index, token=token)
        assert "statistics.safetensors.index.json" in hub.files(f"alice/{name}")
    fresh_cache(monkeypatch, tmp_path / "cache")
    report = mats_hub.merge(EXPERTS, base="alice/base", method="mats", iterations=3, token=token).report
    assert report.solved


def test_statistics_of_a_folder_need_a_repository(token, local, tmp_path):
    found = mats_hub.compute_statistics(
        local.root / "alpha", dataset=local.data("alpha"), output=tmp_path / "a.safetensors"
    )
    with pytest.raises(HubError, match=r"statistics of 'alpha', which is no model on the Hub; name a repository"):
        mats_hub.push_statistics(found.path, token=token)


def test_from_the_command_line(hub, token, local, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    file = measured(local, "alpha", tmp_path, token)
    assert main(["statistics", "push", str(file)]) == 0
    assert hub.commits("alice/alpha")[0].sha in capsys.readouterr().out
    assert main(["statistics", "push", str(file), "alice/beta"]) == 1
    assert "StatisticsMismatch" in capsys.readouterr().err
