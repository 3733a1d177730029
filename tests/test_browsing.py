"""Merges on the Hub: found, traced back to what they were made of, made again, varied; and the `hf` command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import family as families
import pytest
import yaml
from hub_server import validate_card
from safetensors.torch import load_file, save_file

import mats_hub
from mats_hub.browsing import read_card
from mats_hub.cli import main
from mats_hub.errors import MatsError, RecipeError, SourceError
from mats_hub.recipe import Recipe

EXPERTS = [f"alice/{name}" for name in families.LABELS]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=families.EXPERT_CARD)


@pytest.fixture
def token(hub, local):
    """Put the family on the Hub as alice's and return her token."""
    token = families.publish(hub, local)
    return token


def publish(token: str, repo_id: str, experts=EXPERTS, results=(), **options):
    merged = mats_hub.merge(experts, base="alice/base", token=token, **options)
    if results:
        merged.add_results(results)
    merged.push_to_hub(repo_id, token=token)
    return merged


def scores(*values: float) -> list[dict]:
    return [
        {"task": name, "metric": "accuracy", "model": "merged", "value": value, "dataset": f"data of {name}"}
        for name, value in zip(families.LABELS, values, strict=False)
    ]


# --- browse


def test_merges_are_found_by_word_author_and_what_they_are_made_from(hub, token):
    publish(token, "alice/first-merge", method="ties", results=scores(0.5, 0.7, 0.9))
    publish(token, "alice/second-merge", experts=EXPERTS[:2], method="average")
    bob = hub.add_user("bob")
    publish(bob, "bob/his-merge", experts=EXPERTS[1:], method="task_arithmetic")
    hub.create("bob/claims", {"README.md": b"---\ntags: [mats_hub]\n---\n"})
    found = mats_hub.browse()
    assert [merge.repo_id for merge in found] == ["bob/his-merge", "alice/second-merge", "alice/first-merge"]
    first = found[-1]
    assert (first.method, first.base, first.experts) == ("ties", "alice/base", tuple(EXPERTS))
    assert first.mean == pytest.approx(0.7)
    assert {row["dataset"] for row in first.results} == {f"data of {name}" for name in families.LABELS}
    assert found[0].mean is None

    def ids(*arguments, **options) -> list[str]:
        return [merge.repo_id for merge in mats_hub.browse(*arguments, **options)]

    assert ids("first") == ["alice/first-merge"]
    assert ids(author="bob") == ["bob/his-merge"]
    assert ids(base="alice/alpha") == ["alice/second-merge", "alice/first-merge"]
    assert len(ids(base="alice/base")) == 3
    assert ids(base="alice/other") == []
    assert ids(limit=1) == ["bob/his-merge"]


JUNK = [
    "mats_hub: 3",
    "mats_hub: {method: [ties]}",
    "mats_hub: {method: ties, experts: 4, base: [x]}\nbase_model: [3, alice/alpha]",
    "mats_hub: {method: ties}\nmodel-index: [3, {name: x, results: [4, {task: 5, dataset: {}, metrics: [{}]}]}]",
]


def test_malformed_cards_of_others_are_passed_over(hub, token):
    for number, text in enumerate(JUNK):
        hub.create(f"alice/junk-{number}", {"README.md": f"---\ntags: [mats_hub]\n{text}\n---\n".encode()})
    found = {merge.repo_id: merge for merge in mats_hub.browse()}
    assert found.keys() == {"alice/junk-2", "alice/junk-3"}
    assert found["alice/junk-2"].experts == ("alice/alpha",)
    assert found["alice/junk-3"].results == ()


def test_browse_and_show_from_the_command_line(hub, token, capsys, monkeypatch):
    publish(token, "alice/first-merge", method="ties", results=scores(0.5, 0.7, 0.9))
    assert main(["browse", "merge", "--author", "alice"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["model", "method", "experts"]
    assert row.startswith("alice/first-merge  ties")
    assert "0.700 (mean of 3)" in row
    assert main(["browse", "nothing-like-it"]) == 0
    assert "no merge of this package was found" in capsys.readouterr().out
    assert main(["show", "alice/first-merge"]) == 0
    text = capsys.readouterr().out
    card, tree = text.split("\nLineage:\n")
    assert card.rstrip() == read_card("alice/first-merge").rstrip()
    commit = hub.commits("alice/first-merge")[0].sha
    assert tree.splitlines()[0] == f"alice/first-merge@{commit} (merged with ties)"
    assert main(["show", "alice/alpha-without-card", "--lineage"]) == 1
    assert "is not on the Hub" in capsys.readouterr().err


# --- lineage


def test_merges_of_merges_are_traced_to_the_end(hub, token):
    publish(token, "alice/pair", experts=EXPERTS[:2], method="average")
    pair = hub.commits("alice/pair")[0].sha
    gamma, base = (hub.commits(f"alice/{name}")[0].sha for name in ("gamma", "base"))
    hub.commit("alice/gamma", {"README.md": b"---\nbase_model: alice/base\n---\n# gamma, tuned from base\n"})
    publish(token, "alice/all", experts=[f"alice/pair@{pair}", f"alice/gamma@{gamma}"], method="ties")
    tree = mats_hub.lineage("alice/all")
    assert [(p.spec, p.role) for p in tree.parents] == [
        (f"alice/pair@{pair}", "expert"),
        (f"alice/gamma@{gamma}", "expert"),
        (f"alice/base@{base}", "base"),
    ]
    inner = tree.parents[0]
    assert inner.method == "average"
    assert [p.role for p in inner.parents] == ["expert", "expert", "base"]
    lines = str(tree).splitlines()
    assert lines[1].startswith("├── alice/pair@")
    assert lines[2].startswith("│   ├── alice/alpha@")
    assert lines[-1].startswith("└── alice/base@")
    [parent] = mats_hub.lineage("alice/gamma").parents
    assert (parent.spec, parent.role) == (f"alice/base@{base}", "base")


def test_a_lineage_ends_where_nothing_more_is_known(hub, token, local, tmp_path):
    hub.create("alice/a", {"README.md": b"---\nbase_model: alice/b\n---\n", "config.json": b"{}"})
    hub.create("alice/b", {"README.md": b"---\nbase_model: [alice/a, alice/gone, 7]\n---\n", "config.json": b"{}"})
    [b] = mats_hub.lineage("alice/a").parents
    assert [(p.spec.partition("@")[0], p.note) for p in b.parents] == [
        ("alice/a", "shown above"),
        ("alice/gone", "not on the Hub any more, or not for this machine's token"),
    ]
    merged = mats_hub.merge(local.experts, base=local.base, method="average", output=tmp_path / "out")
    notes = {parent.note for parent in mats_hub.lineage(str(merged.folder)).parents}
    assert notes == {"a folder on the machine of whoever merged it"}


# --- replay


def test_a_published_merge_is_made_again_to_the_last_byte(hub, token, tmp_path, capsys):
    for name in families.LABELS:
        file = mats_hub.compute_statistics(
            f"alice/{name}", dataset=hub_data(name, tmp_path), token=token, output=tmp_path / f"{name}.safetensors"
        )
        mats_hub.push_statistics(file.path, f"alice/{name}-statistics", token=token)
    publish(token, "alice/merged", method="mats", iterations=5)
    text = hub.files("alice/merged")["mats_recipe.yaml"].decode()
    assert text.count("statistics: alice/") == 3, "statistics of other repositories are pinned, too"
    hub.commit("alice/alpha", {"model.safetensors": hub.files("alice/beta")["model.safetensors"]})
    hub.commit("alice/beta-statistics", {"statistics.safetensors": b"changed"})
    made = mats_hub.replay("alice/merged", token=token)
    assert made.identical
    assert made.files == {"model.safetensors": True}
    assert made.differences == {}
    assert made.environment == {}
    assert main(["replay", "alice/merged", "--check"]) == 0
    assert "1 of 1 weight files have the same sha256" in capsys.readouterr().out


def hub_data(name: str, folder: Path) -> Path:
    from models import tiny_texts

    rows = [{"text": text, "label": i % families.LABELS[name]} for i, text in enumerate(tiny_texts(8, 1, shortest=3))]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_what_differs_from_the_published_weights_is_told_by_tensor(hub, token, tmp_path, capsys):
    merged = publish(token, "alice/merged", method="average")
    tensors = load_file(merged.folder / "model.safetensors")
    key = next(k for k in tensors if k.endswith("query.weight"))
    tensors[key][0, 0] += 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    report = json.loads(hub.files("alice/merged")["mats_report.json"])
    report["files"]["model.safetensors"] = "0" * 64
    report["environment"]["torch"] = "1.0"
    hub.commit("alice/merged", files | {"mats_report.json": json.dumps(report).encode()})
    made = mats_hub.replay("alice/merged", token=token)
    assert not made.identical
    assert {k: v for k, v in made.differences.items() if v} == {key: pytest.approx(0.5)}
    assert made.environment["torch"][0] == "1.0"
    assert main(["replay", "alice/merged", "--check"]) == 1
    out = capsys.readouterr().out
    assert f"{key}: differs by up to 0.5" in out
    assert "torch: 1.0 there" in out
    del tensors[key]
    tensors["more"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hub.commit("alice/merged", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    other = mats_hub.replay("alice/merged", token=token)
    assert sum(v == float("inf") for v in other.differences.values()) == 3


def test_files_that_differ_in_metadata_alone_hold_the_same_model(hub, token, tmp_path):
    merged = publish(token, "alice/merged", method="average")
    tensors = load_file(merged.folder / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "by": "somebody"})
    report = json.loads(hub.files("alice/merged")["mats_report.json"])
    report["files"]["model.safetensors"] = "0" * 64
    content = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    hub.commit("alice/merged", content | {"mats_report.json": json.dumps(report).encode()})
    made = mats_hub.replay("alice/merged", token=token)
    assert made.identical
    assert "differ in their metadata" in str(made)


def test_a_variant_names_the_merge_it_is_of(hub, token, tmp_path, capsys, monkeypatch):
    publish(token, "alice/merged", method="task_arithmetic", scale=0.3)
    parent = f"alice/merged@{hub.commits('alice/merged')[0].sha}"
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: token)
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    assert main(["replay", "alice/merged", "--change", "scale=0.4", "--push", "alice/variant"]) == 0
    files = hub.files("alice/variant")
    recipe = Recipe.from_yaml(files["mats_recipe.yaml"].decode())
    assert recipe.initialization.scale == 0.4
    text = files["README.md"].decode()
    assert f"a variant of {parent} with scale 0.4" in text
    assert validate_card(text) == ([], [])
    assert json.loads(files["mats_report.json"])["parent"] == parent
    direct = mats_hub.merge(EXPERTS, base="alice/base", method="task_arithmetic", scale=0.4, token=token)
    theirs = load_file(direct.folder / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    ours = load_file(tmp_path / "model.safetensors")
    assert all(bool((ours[key] == value).all()) for key, value in theirs.items())


CHANGES = {
    "another method": ({"method": "ties"}, {"method": "ties", "density": 0.2}),
    "another start": (
        {"initialization": "ties"},
        {"initialization": "ties", "iterations": 7, "normalization": "trace"},
    ),
    "fewer steps": ({"iterations": 3}, {"iterations": 3, "normalization": "trace"}),
    "as an adapter's option": (
        {"rank": 4, "format": "adapter"},
        {"rank": 4, "iterations": 7, "normalization": "trace"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_recipe_keeps_what_still_applies(name):
    changes, expected = CHANGES[name]
    recipe = Recipe.build(
        ["a", {"model": "b", "weight": 2.0}], base="c", method="mats", curvature="kfac", normalization="trace",
        iterations=7, initialization="task_arithmetic", scale=0.7,
    )  # fmt: skip
    changed = recipe.changed(**changes)
    assert changed.experts == recipe.experts
    content = changed.model_dump()
    flat = {
        **content["output"],
        **(content["solver"] or {}),
        **(content["curvature"] or {}),
        **content["initialization"],
    }
    for option, value in expected.items():
        held = (
            content["initialization"]["method"] if option == "initialization" else flat.get(option, content.get(option))
        )
        assert (content["method"] if option == "method" else held) == value
    assert yaml.safe_load(recipe.changed().to_yaml()) == yaml.safe_load(recipe.to_yaml())
    with pytest.raises(RecipeError, match="unknown option 'scael'"):
        recipe.changed(scael=1)


def test_what_cannot_be_replayed_is_refused(hub, token, local, tmp_path, capsys):
    with pytest.raises(SourceError, match="no merge of this package"):
        mats_hub.replay("alice/alpha", token=token)
    merged = mats_hub.merge(local.experts, base=local.base, method="average", output=tmp_path / "out")
    with pytest.raises(SourceError, match=r"merged from folders, of which 'alpha' is not here"):
        mats_hub.replay(merged.folder)
    for arguments, message in (
        (["alice/alpha"], "say what the result is for"),
        (["alice/alpha", "--check", "--push", "a/b"], "--check only compares"),
        (["alice/alpha", "--output", "x", "--change", "scale"], "write NAME=VALUE"),
    ):
        assert main(["replay", *arguments]) == 1
        assert message in capsys.readouterr().err
    publish(token, "alice/merged", method="average")
    hub.commit("alice/merged", {"mats_report.json": b"[]"})
    with pytest.raises(MatsError):
        mats_hub.replay("alice/merged", token=token)


# --- hf mats


def hf(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "hf"
    environment = os.environ | {"HOME": str(home)}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, check=False)


def test_hf_mats_runs_this_installation(tmp_path):
    register = [sys.executable, "-m", "mats_hub", "register-cli"]
    environment = os.environ | {"HOME": str(tmp_path)}
    for _ in range(2):  # a second time changes nothing
        done = subprocess.run(register, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    shown = hf(tmp_path, "mats", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage: hf mats" in shown.stdout
    assert "mats" in hf(tmp_path, "extensions", "list").stdout
    failed = hf(tmp_path, "mats", "plan", str(tmp_path / "nowhere"))
    assert failed.returncode == 1
    assert "is neither a folder on this machine nor a Hub id" in failed.stdout + failed.stderr
    (tmp_path / ".local/share/hf/extensions/hf-mats/venv").mkdir()
    refused = subprocess.run(register, capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 1
    assert "hf extensions remove mats" in refused.stderr


INSTALL = """
import subprocess, sys
from huggingface_hub.cli import extensions, hf

client = sys.modules[type(extensions.get_session()).__module__.partition('.')[0]]
root, run = sys.argv[1], subprocess.run

def answer(request):  # what GitHub says of a repository whose root is this checkout
    if request.url.path.endswith('/info/refs'):
        return client.Response(200, text=f"001e# service\\n{'a' * 40} HEAD\\0")
    if request.url.path.endswith('/pyproject.toml'):
        return client.Response(200, text=open(f'{root}/pyproject.toml').read())
    return client.Response(404 if 'raw' in request.url.host else 200)

def local(command, **options):
    if isinstance(command[-1], str) and 'github.com' in command[-1]:  # what it needs is here already: only itself
        command = [*command[:-1], '--quiet', '--no-deps', root]
    return run(command, **options)

extensions.get_session = lambda: client.Client(transport=client.MockTransport(answer))
extensions.subprocess.run = local
sys.argv = ['hf', 'extensions', 'install', 'mats-hub/hf-mats']
hf.main()
"""


@pytest.mark.slow
def test_the_installer_of_hf_makes_an_extension_of_this_checkout(tmp_path):
    root = Path(mats_hub.__file__).parents[1]
    environment = os.environ | {"HOME": str(tmp_path)}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    command = [sys.executable, "-c", INSTALL, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / ".local/share/hf/extensions/hf-mats"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["short_name"] == "mats"
    assert manifest["description"].startswith("Merge fine-tuned models")
    installed = next((folder / "venv/lib").glob("python*/site-packages"))
    assert (installed / "mats_hub/model_card_template.md").is_file()
    (installed / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # for what it depends on
    shown = hf(tmp_path, "mats", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage: hf mats" in shown.stdout
    assert hf(tmp_path, "mats", "plan", str(tmp_path / "nowhere")).returncode == 1
