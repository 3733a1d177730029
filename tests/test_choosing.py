"""Scores, and what is chosen by them: settings on validation data, methods side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

import family as families
import models
import pytest
import torch
import yaml
from safetensors.torch import load_file

import mats_hub
from mats_hub.candidates import Candidate, merge_candidates
from mats_hub.choosing import compare, default_grid, evaluate_tasks, harness, tune
from mats_hub.cli import main
from mats_hub.errors import RecipeError, StatisticsError
from mats_hub.methods import METHODS
from mats_hub.recipe import Recipe
from mats_hub.statistics import compute_statistics
from mats_hub.suite import Suite


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    family = families.make_family(tmp_path_factory.mktemp("family"))
    for name, folder in zip(families.LABELS, family.experts, strict=True):
        compute_statistics(
            folder, dataset=str(family.data(name)), kind="kfac", output=f"{folder}/statistics.safetensors"
        )
    return family


@pytest.fixture(scope="module")
def tasks(local, tmp_path_factory):
    """Write a file of tasks; the test parts do not exist."""
    path = local.root / "tasks.yaml"
    entries = {name: {"validation": f"{name}.jsonl", "test": f"no-{name}.jsonl"} for name in families.LABELS}
    entries["gamma"] |= {"metric": "loss", "examples": 16, "seed": 3}
    path.write_text(yaml.safe_dump(entries))
    return path


def recipe(local, **options):
    return Recipe.build(local.experts, base=local.base, **options)


@pytest.mark.parametrize("start", ["ties", pytest.param("average", marks=pytest.mark.slow)])
def test_candidates_are_what_a_merge_of_each_recipe_is(local, tmp_path, start):
    """One reading, and one run of conjugate gradient for all numbers of steps: the same bytes."""
    options = [
        {"method": "mats", "initialization": start, "iterations": 2},
        {"method": "mats", "initialization": start, "iterations": 7},
        {"method": "mats", "initialization": start, "iterations": 5, "preconditioner": "kronecker", "damping": 0.1},
        {"method": "mats", "initialization": start, "iterations": 9, "preconditioner": "kronecker", "damping": 0.1},
        {"method": "ties", "density": 0.5},
        {"method": "dare"},
        {"method": "iso_c"},
    ]
    candidates = [Candidate(str(number), recipe(local, **chosen)) for number, chosen in enumerate(options)]
    seen = []
    for candidate in merge_candidates(candidates, tmp_path, torch.device("cpu")):
        assert not candidate.problem
        alone = mats_hub.merge(recipe(local, **options[int(candidate.label)]))
        ours, theirs = (load_file(Path(f) / "model.safetensors") for f in (candidate.folder, alone.folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert mats_hub.load(candidate.folder, "beta").config.num_labels == 3
        seen.append(candidate.label)
    assert sorted(seen) == [str(number) for number in range(len(options))]
    assert not list(tmp_path.iterdir())


def test_tune_scores_every_setting_on_validation_data_alone(local, tasks, tmp_path):
    choice = tune(recipe(local, method="task_arithmetic"), tasks, grid={"scale": [0.1, 0.4, 30.0]})
    assert [c.label for c in choice.candidates] == ["scale 0.1", "scale 0.4", "scale 30"]
    for candidate in choice.candidates:
        merged = mats_hub.merge(
            local.experts, base=local.base, method="task_arithmetic", scale=candidate.recipe.initialization.scale
        )
        alpha = mats_hub.evaluate(merged.folder, task="alpha", dataset=str(local.data("alpha")))
        assert candidate.scores["alpha"] == alpha
        suite = Suite.load(tasks)
        data = suite.data("gamma", "validation")
        assert len(data) == 16
        loss = mats_hub.evaluate(merged.folder, task="gamma", dataset=data, metric="loss")
        assert candidate.scores["gamma"] == pytest.approx(loss)
    ratios = [choice.mean(candidate) for candidate in choice.candidates]
    assert choice.best is choice.candidates[ratios.index(max(ratios))]
    assert choice.metrics == {"alpha": "accuracy", "beta": "accuracy", "gamma": "loss"}
    best = choice.save(tmp_path / "tuned")
    again = mats_hub.merge(best)
    assert again.report.recipe["initialization"]["scale"] == choice.best.recipe.initialization.scale
    alpha = mats_hub.evaluate(again.folder, task="alpha", dataset=str(local.data("alpha")))
    assert choice.best.scores["alpha"] == alpha
    weighed = tune(recipe(local, method="ties"), tasks, grid={"weight.beta": [0.5, 3]}).candidates
    assert [[e.weight for e in c.recipe.experts] for c in weighed] == [[1, 0.5, 1], [1, 3, 1]]
    own = [{"model": model, "weight": 3 if model.endswith("beta") else 1} for model in local.experts]
    merged = mats_hub.merge(own, base=local.base, method="ties")
    assert weighed[1].scores["alpha"] == mats_hub.evaluate(
        merged.folder, task="alpha", dataset=str(local.data("alpha"))
    )
    assert [e.task for e in Recipe.build(["a/b@refs/pr/1", "a/b/c", local.experts[0]]).experts] == ["b", "c", "alpha"]
    with pytest.raises(RecipeError, match=r"weight\.bta: unknown expert 'bta'. Did you mean 'beta'"):
        tune(recipe(local, method="ties"), tasks, grid={"weight.bta": [1]})
    content = json.loads((tmp_path / "tuned/scores.json").read_text())
    assert [row["label"] for row in content["candidates"]] == [c.label for c in choice.candidates]
    assert (tmp_path / "tuned/scores.png").stat().st_size > 5000


def test_only_the_target_counts_where_others_help_it(local, tasks):
    choice = tune(recipe(local, method="task_arithmetic"), tasks, grid={"scale": [0.1, 0.4]}, only=["beta"])
    assert list(choice.metrics) == ["beta"]
    assert all(list(candidate.scores) == ["beta"] for candidate in choice.candidates)


def test_adapters_are_tuned_as_the_adapters_they_become(local, tasks, tmp_path):
    adapters = []
    for seed, name in enumerate(families.LABELS):
        folder = tmp_path / name
        models.lora_adapter(Path(local.base), folder, seed=seed, labels=families.LABELS[name])
        adapters.append(str(folder))
    start = Recipe.build(adapters, method="task_arithmetic")
    choice = tune(start, tasks, grid={"scale": [0.2, 0.5]})
    assert not any(candidate.problem for candidate in choice.candidates)
    assert choice.best.recipe.output.format == "adapter"


def test_compare_lists_what_cannot_be_done(local, tasks):
    choice = compare(recipe(local), tasks, methods=["average", "slerp", "mats", "fisher"])
    said = {candidate.label: candidate.problem for candidate in choice.candidates}
    assert not said["average"]
    assert not said["mats"]
    assert "slerp interpolates between two experts" in said["slerp"]
    assert "fisher" in said["fisher"]
    assert "slerp: not merged" in str(choice)
    assert choice.best.label in ("average", "mats")
    with pytest.raises(RecipeError, match="unknown method 'averag'"):
        compare(recipe(local), tasks, methods=["averag"])


def test_compare_tunes_each_method_first(local, tasks):
    choice = compare(recipe(local), tasks, methods=["average", "breadcrumbs"], tuned=True)
    assert choice.candidates[0].label == "average"
    assert choice.candidates[1].label.startswith("breadcrumbs (scale ")


def test_every_method_has_a_grid_or_nothing_to_choose():
    for name in METHODS:
        chosen = Recipe.build(["a", "b"], method=name)
        for option in default_grid(chosen):
            chosen.changed(**{option: default_grid(chosen)[option][0]})
    assert default_grid(Recipe.build(["a"], method="average")) == {}


def test_the_commands(local, tasks, tmp_path, capsys):
    flags = [*local.experts, "--base", local.base, "--tasks", str(tasks)]
    tuning = ["--method", "task_arithmetic", "--grid", "scale=0.1,0.4", "--output", str(tmp_path / "tuned")]
    assert main(["tune", *flags, *tuning, "--grid", "weight.alpha=1,2"]) == 0
    out = capsys.readouterr().out
    assert "scale 0.4, weight.alpha 2" in out
    assert "best on validation data: scale" in out
    assert main(["merge", str(tmp_path / "tuned/best.yaml"), "--output", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert main(["compare", *flags, "--methods", "average,ties", "--output", str(tmp_path / "compared")]) == 0
    assert "best on validation data" in capsys.readouterr().out
    assert main(["tune", *flags, *tuning[:2], "--grid", "scale", "--output", "x"]) == 1
    assert "write NAME=V1,V2" in capsys.readouterr().err
    merged = mats_hub.merge(local.experts, base=local.base, method="average", output=tmp_path / "merged")
    beside = [f"{name}={folder}" for name, folder in zip(families.LABELS, local.experts, strict=True)]
    scoring = ["--tasks", str(tasks), "--part", "validation", "--experts", *beside, "--add"]
    assert main(["evaluate", str(merged.folder), *scoring]) == 0
    assert "of it)" in capsys.readouterr().out
    results = mats_hub.MergedModel.open(merged.folder).report.results
    assert {(row["task"], row["model"]) for row in results} == {
        (t, m) for t in families.LABELS for m in ("merged", "expert")
    }
    assert "## Results" in (merged.folder / "README.md").read_text()
    assert main(["evaluate", str(merged.folder), "--tasks", str(tasks)]) == 1
    assert "no-alpha.jsonl" in capsys.readouterr().err
    assert main(["evaluate", str(merged.folder)]) == 1
    assert "say on what" in capsys.readouterr().err
    assert main(["evaluate", str(merged.folder), "--lm-eval", "arc_easy"]) == 1
    assert "pip install 'mats-hub[lm-eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no tasks"),
        (
            {"a": {"dataset": "x/y", "metrics": "f1"}},
            r"a: metrics: unknown key 'metrics'. Did you mean 'metric'\? Known: dataset, config",
        ),
        ({"a": {"dataset": "x/y", "metric": "f2"}}, "a: metric: unknown value 'f2'. Known: accuracy, f1"),
        ({"a": {"validation": "validation"}}, "without 'dataset', 'validation' and 'test' are files"),
        ({"a": 3}, "a: Input should be a valid dictionary"),
    ],
)
def test_a_file_of_tasks_that_cannot_be(tmp_path, content, said):
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=said):
        Suite.load(path)


def test_tasks_are_named_as_the_experts(local, tasks):
    with pytest.raises(RecipeError, match=r"unknown expert 'alpa'. Did you mean 'alpha'"):
        tune(recipe(local, method="average"), {"alpa": {"validation": "a.jsonl", "test": "b.jsonl"}})


def test_scores_by_hand(local):
    model = mats_hub.load(local.experts[0])
    data = [json.loads(line) for line in local.data("alpha").read_text().splitlines()]
    texts, labels = [row["text"] for row in data], torch.tensor([row["label"] for row in data])
    tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(local.experts[0])
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    predicted = logits.argmax(-1)
    hits = int(((predicted == 1) & (labels == 1)).sum())
    f1 = 2 * hits / max(1, int((predicted == 1).sum() + (labels == 1).sum()))

    def score(metric):
        return mats_hub.evaluate(local.experts[0], dataset=str(local.data("alpha")), metric=metric, batch_size=5)

    assert score("f1") == pytest.approx(f1)
    assert score("accuracy") == pytest.approx(float((predicted == labels).float().mean()))
    assert score("loss") == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    with pytest.raises(StatisticsError, match="perplexity is of tokens"):
        score("perplexity")
    with pytest.raises(RecipeError, match="unknown metric 'accurcy'"):
        score("accurcy")


def test_an_adapter_without_a_tokenizer_is_scored_with_its_bases(tmp_path, local):
    models.lora_adapter(Path(local.base), tmp_path / "adapter", seed=1, labels=2)
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()
    found = mats_hub.evaluate(tmp_path / "adapter", dataset=local.data("alpha"))
    assert found == mats_hub.evaluate(tmp_path / "adapter", dataset=local.data("alpha"), processor=local.base)


def test_perplexity_is_over_tokens(tmp_path):
    model = models.tiny_llama()
    models.save(model, tmp_path / "llama", "llama")
    texts = models.tiny_texts(7, 1)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(tmp_path / "llama")
    total = count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = mats_hub.evaluate(tmp_path / "llama", dataset=tmp_path / "texts.jsonl", metric="perplexity", batch_size=3)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)


def test_rows_for_the_card_name_data_sets_on_the_hub(local, tasks):
    suite = Suite.load(tasks)
    merged = mats_hub.merge(local.experts, base=local.base, method="average")
    rows = evaluate_tasks(merged.folder, suite, part="validation", experts={"alpha": local.experts[0]})
    assert [(row["task"], row["model"]) for row in rows] == [
        ("alpha", "merged"), ("alpha", "expert"), ("beta", "merged"), ("gamma", "merged")
    ]  # fmt: skip
    assert all("dataset" not in row for row in rows)


LM_TASK = """
task: copying
dataset_path: json
dataset_kwargs: {data_files: {test: TEST}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""


def test_a_language_model_is_scored_by_the_harness(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs pip install 'mats-hub[lm-eval]'")
    models.save(models.tiny_gpt2(), tmp_path / "model", "gpt2")
    (tmp_path / "test.jsonl").write_text('{"text": "a b c", "target": " d"}\n' * 4)
    (tmp_path / "task.yaml").write_text(LM_TASK.replace("TEST", str(tmp_path / "test.jsonl")))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = harness(tmp_path / "model", [str(tmp_path / "task.yaml")], "cpu")
    assert {(row["task"], row["metric"], row["model"]) for row in rows} == {
        ("copying", "acc", "merged"),
        ("copying", "perplexity", "merged"),
    }
    assert all(row["value"] >= 0 for row in rows)
