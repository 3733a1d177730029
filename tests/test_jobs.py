"""A merge as a Job: what is sent, what it does there (run as a process here), and how it ends."""

from __future__ import annotations

import family as families
import hub_jobs
import pytest
import yaml

import mats_hub
from mats_hub import jobs
from mats_hub.cli import main
from mats_hub.errors import HubError, MatsError, RecipeError

EXPERTS = [f"alice/{name}" for name in families.LABELS]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=families.EXPERT_CARD)


@pytest.fixture
def token(hub, local, monkeypatch):
    token = families.publish(hub, local)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(jobs, "PACKAGE", "pip")  # what the Job needs is installed where it runs
    hub_jobs.JOBS.clear()
    return token


def test_a_job_merges_and_publishes(hub, token, local, capsys):
    flags = ["--base", "alice/base", "--method", "ties", "--job", "t4-small", "--push", "alice/merged", "--private"]
    assert main(["merge", *EXPERTS, *flags, "--job-package", "pip"]) == 0
    out = capsys.readouterr().out
    assert "t4-small: 4 vCPU, 15 GB, 1 × T4, $0.006667 per minute" in out
    assert "merged 3 experts with ties into merged" in out
    (job,) = hub_jobs.JOBS.values()
    assert job.spec["flavor"] == "t4-small"
    assert job.spec["secrets"] == {"HF_TOKEN": token}
    assert token not in str({**job.spec, "secrets": None})
    recipe = yaml.safe_load(job.spec["environment"]["MATS_RECIPE"])
    assert all(len(expert["model"].partition("@")[2]) == 40 for expert in recipe["experts"])
    assert hub.repo("alice/merged").private
    here = mats_hub.merge(local.experts, base=local.base, method="ties")
    assert (
        hub.files("alice/merged")["model.safetensors"][-1000:]
        == (here.folder / "model.safetensors").read_bytes()[-1000:]
    )


def test_a_job_that_fails_is_an_error(hub, token, capsys):
    flags = ["--base", "alice/base", "--method", "ties", "--job", "cpu-basic", "--push", "alice/merged"]
    assert main(["merge", *EXPERTS, *flags, "--job-package", "./nothing-here"]) == 1
    said = capsys.readouterr()
    assert "ended as ERROR" in said.err
    assert "nothing-here" in said.out
    assert hub.find("alice/merged") is None


def test_what_a_job_cannot_do_is_said_before_it_runs(hub, token, local, capsys):
    recipe = mats_hub.Recipe.build(EXPERTS, base="alice/base", method="average")
    with pytest.raises(RecipeError, match=r"unknown flavor 't4-smal'. Did you mean 't4-small'"):
        jobs.submit(recipe, "alice/merged", "t4-smal")
    mixed = mats_hub.Recipe.build([*EXPERTS[:2], local.experts[2]], base="alice/base", method="average")
    with pytest.raises(RecipeError, match=r"'gamma' is on this machine; publish it first"):
        jobs.submit(mixed, "alice/merged", "cpu-basic")
    with pytest.raises(HubError, match="may not make a repository"):
        jobs.submit(recipe, "bob/merged", "cpu-basic")
    with pytest.raises(MatsError, match="nowhere"):
        jobs.submit(mats_hub.Recipe.build(["alice/nowhere"], method="average"), "alice/merged", "cpu-basic")
    assert not hub_jobs.JOBS
    assert main(["merge", *EXPERTS, "--base", "alice/base", "--job", "cpu-basic"]) == 1
    assert "a Job publishes what it makes" in capsys.readouterr().err
    assert main(["merge", *EXPERTS, "--base", "alice/base"]) == 1
    assert "--output" in capsys.readouterr().err
