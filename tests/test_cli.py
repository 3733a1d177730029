"""The command line: every command does what its Python call does, and says what went wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import family as families
import pytest
import yaml

import mats_hub
from mats_hub.cli import main
from mats_hub.recipe import INITIALIZATION_OPTIONS, OPTION_OWNERS, Recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"))


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, mats_hub, mats_hub.cli\n"
        "try: mats_hub.cli.main(['merge', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'gradio', 'peft', 'datasets', 'numpy', 'matplotlib', 'huggingface_hub'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_option_of_the_schema_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = capsys.readouterr().out
    parts = {"experts", "initialization", "curvature", "solver", "output"}
    for name in [*(set(Recipe.model_fields) - parts), *OPTION_OWNERS, "initialization", "curvature", "solver"]:
        assert f"--{name.replace('_', '-')}" in text
    for name in INITIALIZATION_OPTIONS:
        assert name in text


def test_statistics_plan_and_merge(family, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in families.LABELS:
        status = main(
            [
                "statistics",
                str(family.root / name),
                "--kind",
                "kfac",
                "--kind",
                "fisher",
                "--dataset",
                str(family.data(name)),
            ]
        )
        assert status == 0
    files = [f"{name}.statistics.safetensors" for name in families.LABELS]
    assert all(Path(file).exists() for file in files)
    flags = ["--base", family.base, "--method", "mats", "--statistics", *files, "--initialization", "task_arithmetic"]
    flags += ["--scale", "0.3", "--iterations", "5"]
    assert main(["plan", *family.experts, *flags]) == 0
    assert "nothing stands in the way" in capsys.readouterr().out
    assert main(["merge", *family.experts, *flags, "--output", "merged"]) == 0
    assert "merged 3 experts with mats into merged" in capsys.readouterr().out
    recipe = yaml.safe_load(Path("merged/mats_recipe.yaml").read_text())
    assert recipe["solver"]["iterations"] == 5
    assert recipe["initialization"] == {"method": "task_arithmetic", "scale": 0.3}
    again = mats_hub.merge(
        [
            {"model": expert, "statistics": file}
            for expert, file in zip(family.experts, files, strict=True)
        ],
        base=family.base, method="mats", initialization="task_arithmetic", scale=0.3, iterations=5,
    )  # fmt: skip
    assert again.report.files == mats_hub.MergedModel.open("merged").report.files


def test_merge_and_push(family, hub, tmp_path, monkeypatch, capsys):
    token = hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    flags = ["--base", family.base, "--method", "average", "--output", str(tmp_path / "out")]
    assert main(["merge", *family.experts, *flags, "--push", "alice/merged", "--private"]) == 0
    assert hub.url in capsys.readouterr().out
    assert hub.repo("alice/merged").private
    assert main(["push", str(tmp_path / "out"), "alice/second"]) == 0
    assert "model.safetensors" in hub.files("alice/second")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "EXPERT", "--method", "tise", "--output", "OUT"], "unknown method 'tise'. Did you mean 'ties'?"),
        (["merge", "EXPERT", "--method", "ties", "--density", "2", "--output", "OUT"], "less than or equal to 1"),
        (["merge", "EXPERT", "--name", "a", "b", "--output", "OUT"], "--name has 2 values for 1 experts"),
        (["merge", "nowhere.yaml", "--output", "OUT"], "cannot read the recipe"),
        (["merge", "recipe.yaml", "--seed", "1", "--output", "OUT"], "a recipe file stands alone"),
        (
            ["statistics", "EXPERT", "--dataset", "nowhere.jsonl", "--kind", "hessian"],
            "unknown kind of statistics 'hessian'",
        ),
        (["merge", "EXPERT", "--method", "average", "--device", "cuda:99", "--output", "OUT"], "device 'cuda:99'"),
    ],
)
def test_mistakes_are_explained_on_one_line_with_status_one(family, tmp_path, capsys, arguments, message):
    places = {"EXPERT": family.experts[0], "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mats-hub: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_plan_with_problems_ends_with_status_one(family, capsys):
    assert main(["plan", *family.experts, "--method", "ties"]) == 1
    assert "PROBLEM: RecipeError: ties works on task vectors" in capsys.readouterr().out
