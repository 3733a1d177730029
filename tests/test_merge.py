"""The whole way: folders in, a merged folder out, loaded by transformers; and everything that stops it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import family as families
import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

import mats_hub
from mats_hub import thresholds
from mats_hub.errors import MatsError, NumericalError, OutputError, PlanError, RecipeError, SourceError
from mats_hub.methods import METHODS

RTOL = 1e-5


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = families.make_family(tmp_path_factory.mktemp("family"))
    for expert in made.experts:
        mats_hub.compute_statistics(
            expert,
            dataset=made.data(Path(expert).name),
            kind=["kfac", "fisher"],
            output=Path(expert) / "statistics.safetensors",
        )
    return made


@pytest.fixture
def copy(family, tmp_path):
    """Return the family in a folder that a test may damage."""
    shutil.copytree(family.root, tmp_path / "copy")
    return families.Family(tmp_path / "copy")


def base_and_experts(family):
    base = load_file(Path(family.base) / "model.safetensors")
    experts = [load_file(Path(expert) / "model.safetensors") for expert in family.experts]
    return base, experts


def weights(merged) -> dict[str, torch.Tensor]:
    """Return the merged checkpoint's tensors; the argument keeps a temporary folder alive meanwhile."""
    return load_file(merged.folder / "model.safetensors")


def problem(*arguments, **options) -> str:
    with pytest.raises(MatsError) as caught:
        mats_hub.merge(*arguments, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_an_ordinary_repository(family, tmp_path, method):
    experts = family.experts[:2] if method == "slerp" else family.experts
    merged = mats_hub.merge(experts, base=family.base, method=method, output=tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the film").input_ids == [2, 6, 8, 3]
    expected = load_file(Path(family.base) / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    solved = {record.key for record in merged.report.solved}
    if METHODS[method].curvature is None:
        assert not solved
    else:
        linear = {f"encoder.layer.{i}.{m}.weight" for i in (0, 1) for m in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense")}  # fmt: skip
        assert linear <= solved


def test_average_and_task_arithmetic_are_their_formulas(family):
    base, experts = base_and_experts(family)
    average = weights(mats_hub.merge(family.experts, base=family.base, method="average"))
    summed = weights(mats_hub.merge(family.experts, base=family.base, method="task_arithmetic", scale=0.4))
    for key, value in base.items():
        own = [expert[f"bert.{key}"] for expert in experts]
        torch.testing.assert_close(average[key], sum(own) / 3, rtol=RTOL, atol=1e-6)
        torch.testing.assert_close(summed[key], value + 0.4 * sum(e - value for e in own), rtol=RTOL, atol=1e-6)


def test_ties_trims_over_the_whole_task_vector(family):
    base, experts = base_and_experts(family)
    written = weights(mats_hub.merge(family.experts, base=family.base, method="ties", density=0.3))
    keys = sorted(base)
    vectors = [torch.cat([(e[f"bert.{k}"] - base[k]).flatten() for k in keys]) for e in experts]
    count = len(vectors[0])
    trimmed = []
    for vector in vectors:
        cut = vector.abs().kthvalue(count - int(0.3 * count)).values
        trimmed.append(torch.where(vector.abs() >= cut, vector, 0))
    stacked = torch.stack(trimmed)
    sign = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked * sign > 0
    merged = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    result = torch.cat([(written[k] - base[k]).flatten() for k in keys])
    torch.testing.assert_close(result, merged, rtol=1e-4, atol=1e-6)


def test_ties_thresholds_take_one_reading_and_more_where_the_guess_from_a_sample_misses(family, monkeypatch):
    def merged() -> tuple[dict, int]:
        told: list[str] = []

        def progress(items, total, text):
            told.append(text)
            return items

        made = mats_hub.merge(family.experts, base=family.base, method="ties", density=0.3, progress=progress)
        return made.report.files, sum(text.startswith("magnitudes") for text in told)

    files, passes = merged()
    assert passes == 1
    monkeypatch.setattr(thresholds, "SAMPLE", 100)
    monkeypatch.setattr(thresholds.MagnitudeRank, "WINDOW", 16)
    assert merged() == (files, 3)


def test_regmean_is_the_least_squares_solution(family):
    _, experts = base_and_experts(family)
    merged = mats_hub.merge(family.experts, base=family.base, method="regmean", off_diagonal=1.0)
    written = weights(merged)
    module = "encoder.layer.1.output.dense"
    grams, own = [], []
    for expert, state in zip(family.experts, experts, strict=True):
        statistics = mats_hub.Statistics.load(Path(expert) / "statistics.safetensors")
        grams.append(statistics.tensor(f"bert.{module}.input_gram").double() / statistics.tokens[f"bert.{module}"])
        own.append(state[f"bert.{module}.weight"].double())
    residual = written[f"{module}.weight"].double() @ sum(grams) - sum(w @ g for w, g in zip(own, grams, strict=True))
    scale = sum(w @ g for w, g in zip(own, grams, strict=True)).norm()
    assert residual.norm() / scale < 1e-5
    record = next(r for r in merged.report.solved if r.key == f"{module}.weight")
    assert record.outcome == "solved exactly"


def test_mats_records_and_lowers_the_residual(family):
    merged = mats_hub.merge(family.experts, base=family.base, method="mats", iterations=40)
    assert merged.report.solved
    for record in merged.report.solved:
        assert record.iterations <= 40
        # Of what is the same for all experts, rounding error alone is there from the start.
        assert record.residual < max(record.residuals[0] / 5, 1e-6)
        assert len(record.expert_norms) == 3


def test_heads_are_kept_and_loaded_with_their_labels(family, tmp_path):
    mats_hub.merge(family.experts, base=family.base, method="average", output=tmp_path / "out")
    body = load_file(tmp_path / "out" / "model.safetensors")
    for name, count in families.LABELS.items():
        model = mats_hub.load(tmp_path / "out", task=name)
        expert = BertForSequenceClassification.from_pretrained(family.root / name)
        assert model.config.id2label == {i: f"{name}-{i}" for i in range(count)}
        torch.testing.assert_close(model.classifier.weight, expert.classifier.weight, rtol=0, atol=0)
        key = "encoder.layer.0.output.dense.weight"
        torch.testing.assert_close(model.bert.state_dict()[key], body[key], rtol=0, atol=0)
    with pytest.raises(SourceError, match=r"unknown task 'alfa'. Did you mean 'alpha'\? Known: alpha, beta, gamma"):
        mats_hub.load(tmp_path / "out", task="alfa")


def test_one_expert_comes_back(family):
    for method in ("average", "regmean", "mats", "fisher"):
        merged = mats_hub.merge(family.experts[:1], base=family.base, method=method)
        written = weights(merged)
        own = load_file(Path(family.experts[0]) / "model.safetensors")
        for key, value in written.items():
            torch.testing.assert_close(value, own[f"bert.{key}"], rtol=0, atol=1e-7)


def test_without_a_base_the_experts_mean_is_the_origin(family):
    with_base = weights(mats_hub.merge(family.experts, base=family.base, method="regmean"))
    without = weights(mats_hub.merge(family.experts, method="regmean"))
    assert not any(key.startswith("classifier") for key in without)  # the labels differ, so heads are kept per task
    for key, value in with_base.items():
        torch.testing.assert_close(without[f"bert.{key}"], value, rtol=1e-4, atol=1e-5)


def test_weights_and_their_order_do_not_matter_beyond_their_values(family):
    entries = [{"model": e, "weight": w} for e, w in zip(family.experts, (1.0, 2.0, 0.5), strict=True)]
    one = weights(mats_hub.merge(entries, base=family.base, method="average"))
    other = weights(mats_hub.merge(entries[::-1], base=family.base, method="average"))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=RTOL, atol=1e-6)


def test_a_task_is_taken_away(family):
    base, experts = base_and_experts(family)
    entries = [{"model": family.experts[0], "weight": 1.5}, {"model": family.experts[1], "weight": -0.5}]
    options = {"base": family.base, "scale": 1.0}
    forgets = weights(mats_hub.merge(entries, method="task_arithmetic", **options))
    extrapolated = weights(mats_hub.merge(entries, method="average", base=family.base))
    for key, value in base.items():
        first, second = (expert[f"bert.{key}"] for expert in experts[:2])
        expected = value + 1.5 * (first - value) - 0.5 * (second - value)
        torch.testing.assert_close(forgets[key], expected, rtol=RTOL, atol=1e-6)
        torch.testing.assert_close(extrapolated[key], expected, rtol=RTOL, atol=1e-6)
    entries[1]["weight"] = -1.5
    for method in ("average", "slerp", "consensus", "wudi", "regmean"):
        said = problem(entries, method=method, base=family.base)
        assert f"has weight -1.5, but method '{method}' takes no task away" in said
    assert "an expert of weight 0 counts for nothing" in problem([{"model": "a", "weight": 0}], method="ties")


def test_patterns_leave_out_and_keep(family):
    merged = mats_hub.merge(
        family.experts, base=family.base, method="average", exclude=["embeddings.*"], keep_per_task=["pooler.*"]
    )
    base, experts = base_and_experts(family)
    written = weights(merged)
    torch.testing.assert_close(written["embeddings.word_embeddings.weight"], base["embeddings.word_embeddings.weight"])
    loaded = merged.load("beta")
    torch.testing.assert_close(loaded.bert.pooler.dense.weight.data, experts[1]["bert.pooler.dense.weight"])
    torch.testing.assert_close(written["pooler.dense.weight"], base["pooler.dense.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_stored_as_they_came_or_as_asked(tmp_path, dtype):
    made = families.make_family(tmp_path / "family", dtype)
    stored = weights(mats_hub.merge(made.experts, base=made.base, method="average"))
    assert {value.dtype for value in stored.values()} == {dtype}
    wide = mats_hub.merge(made.experts, base=made.base, method="average", dtype="float32")
    assert {value.dtype for value in weights(wide).values()} == {torch.float32}
    assert wide.load("alpha").dtype == torch.float32


def test_shards_are_written_and_read(family, tmp_path):
    merged = mats_hub.merge(
        family.experts, base=family.base, method="ties", max_shard_size="6KB", output=tmp_path / "sharded"
    )
    files = sorted(tmp_path.glob("sharded/model-*.safetensors"))
    assert len(files) > 3
    whole = mats_hub.merge(family.experts, base=family.base, method="ties")
    parts = {key: value for file in files for key, value in load_file(file).items()}
    for key, value in weights(whole).items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=0)
    again = mats_hub.merge([str(tmp_path / "sharded")], base=family.base, method="average")  # and opened again
    torch.testing.assert_close(weights(again)["pooler.dense.bias"], parts["pooler.dense.bias"])
    assert set(merged.report.files) == {file.name for file in files}
    assert AutoModel.from_pretrained(tmp_path / "sharded") is not None


def test_the_recipe_in_the_folder_repeats_the_merge(family, tmp_path, monkeypatch):
    first = mats_hub.merge(
        family.experts, base=family.base, method="mats", iterations=7, initialization="ties", output=tmp_path / "first"
    )
    monkeypatch.chdir(family.root)  # the recipe calls local folders by their last part
    again = mats_hub.merge(tmp_path / "first" / "mats_recipe.yaml", output=tmp_path / "again")
    assert again.report.files == first.report.files
    with safe_open(tmp_path / "first" / "model.safetensors", "pt") as file:
        assert len(file.metadata()["mats_recipe_sha256"]) == 64


def test_auto_takes_what_fits_and_says_why(family, tmp_path):
    def chosen(experts, **options):
        plan = mats_hub.make_plan(mats_hub.Recipe.build(experts, **options))
        (note,) = [note for note in plan.notes if note.startswith("no method was named")]
        return plan.recipe, note

    recipe, note = chosen(family.experts, base=family.base)
    assert (recipe.method, recipe.curvature.kind, recipe.curvature.normalization) == ("mats", "kfac", "trace")
    assert (recipe.solver.preconditioner, recipe.solver.damping, recipe.solver.iterations) == ("kronecker", 0.01, 30)
    assert recipe.solver.tolerance == 0.01
    assert "every expert has K-FAC statistics" in note
    bare = families.make_family(tmp_path / "bare")
    recipe, note = chosen(bare.experts, base=bare.base)
    assert (recipe.method, recipe.curvature.kind) == ("mats", "task_vector")
    assert (recipe.solver.iterations, recipe.solver.damping, recipe.solver.tolerance) == (30, 1.0, 0.01)
    assert "there are no statistics" in note
    assert chosen(bare.experts)[0].method == "average"
    mixed, note = chosen([family.experts[0], *bare.experts[1:]], base=family.base)
    assert mixed.curvature.kind == "task_vector"
    assert "(none for beta, gamma)" in note
    for seed in (1, 2):
        models.lora_adapter(Path(bare.base), tmp_path / f"lora{seed}", seed=seed, labels=2)
    assert chosen([str(tmp_path / f"lora{seed}") for seed in (1, 2)])[0].method == "ties"
    merged = mats_hub.merge(family.experts, base=family.base)
    assert note.split(":")[0] in (merged.folder / "README.md").read_text()
    again = mats_hub.Recipe.load(merged.folder / "mats_recipe.yaml")
    assert (again.method, again.solver.damping) == ("mats", 0.01)


def test_a_recipe_that_leaves_the_choice_can_be_written_and_changed_and_gives_no_options(tmp_path):
    recipe = mats_hub.Recipe.build(["one", "other"], base="base", seed=3)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert mats_hub.Recipe.load(tmp_path / "recipe.yaml") == recipe.changed() == recipe
    assert recipe.changed(method="ties", density=0.5).initialization.density == 0.5
    for options, part in (({"iterations": 5}, "solver"), ({"initialization": "ties"}, "initialization")):
        with pytest.raises(RecipeError, match=f"'auto' chooses the {part} itself.*name a method"):
            mats_hub.Recipe.build(["one", "other"], method="auto", **options)
        with pytest.raises(RecipeError, match="name a method"):
            recipe.changed(**options)


def test_save_copies_and_no_local_path_is_written(family, tmp_path):
    merged = mats_hub.merge(family.experts, base=family.base, method="mats", iterations=3)
    merged.save(tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("*"):
        if path.suffix in (".json", ".md", ".yaml", ".safetensors"):
            assert str(family.root).encode() not in path.read_bytes(), path
    with pytest.raises(OutputError, match="not an empty folder"):
        merged.save(tmp_path / "saved")


def test_the_plan_reads_no_weight_and_lists_every_problem(copy):
    for expert in copy.experts:  # only headers are left: a plan must not notice
        path = Path(expert) / "statistics.safetensors"
        path.unlink()
    plan = mats_hub.make_plan(mats_hub.Recipe.build(copy.experts, base=copy.base, method="regmean"))
    assert len(plan.problems) == 3
    assert {str(entry.action) for entry in plan.entries} == {"initialize"}
    text = str(plan)
    assert text.count("PROBLEM: StatisticsMismatch") == 3
    assert "encoder.layer.*.attention.self.query.weight" in text
    assert "memory: about" in text


def test_failures_leave_nothing_behind(copy, tmp_path):
    target = tmp_path / "target" / "out"
    path = Path(copy.experts[1]) / "model.safetensors"
    state = load_file(path)
    state["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(
        NumericalError, match=r"expert 'beta' has a NaN .* tensor 'encoder.layer.1.output.dense.weight'"
    ):
        mats_hub.merge(copy.experts, base=copy.base, method="average", output=target)
    assert list(target.parent.iterdir()) == []


def test_overflow_in_the_stored_dtype_is_an_error(tmp_path):
    made = families.make_family(tmp_path / "family", torch.float16)
    path = Path(made.experts[0]) / "model.safetensors"
    state = load_file(path)
    state["bert.pooler.dense.weight"] += 60000
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"'pooler.dense.weight' does not stay finite .* F16 .*--dtype float32"):
        mats_hub.merge(made.experts, base=made.base, method="task_arithmetic", scale=3.0)


def test_output_must_be_free(family, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "exists and is not an empty folder" in problem(family.experts, method="average", output=tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    mats_hub.merge(family.experts, method="average", output=tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def save_other(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def test_other_architectures_and_shapes_are_refused(family, tmp_path):
    gpt2 = save_other(models.tiny_gpt2(), tmp_path / "gpt2")
    assert "expert 'gpt2' is a gpt2 model, but" in problem(
        [family.experts[0], gpt2], base=family.base, method="average"
    )
    deep = save_other(models.tiny_bert_classifier(num_hidden_layers=3), tmp_path / "deep")
    text = problem([family.experts[0], deep], base=family.base, method="average")
    assert "expert 'deep' has another number of layers" in text
    assert "encoder.layer.2" in text
    shallow = save_other(models.tiny_bert_classifier(num_hidden_layers=1), tmp_path / "shallow")
    assert "it lacks 'encoder.layer.1" in problem([family.experts[0], shallow], base=family.base, method="average")
    wide = save_other(models.tiny_bert_classifier(max_position_embeddings=50), tmp_path / "wide")
    text = problem([family.experts[0], wide], base=family.base, method="average")
    assert "'embeddings.position_embeddings.weight' is (50, 16) and should be" in text
    assert "--exclude" in text


def test_adapters_of_another_base_are_refused_by_name(family, tmp_path):
    other = families.make_family(tmp_path / "other", first=7)
    for number, base in ((1, family.base), (2, other.base)):
        models.lora_adapter(Path(base), tmp_path / f"adapter{number}", seed=number, labels=2)
    adapters = [str(tmp_path / f"adapter{number}") for number in (1, 2)]
    text = problem(adapters, method="average")
    assert "'" + adapters[0] + "' was trained on base" in text
    assert "allow_other_base: true" in text
    assert "was trained on base" in problem(adapters[1:], base=family.base, method="average")
    merged = mats_hub.merge(adapters, base=family.base, method="average", allow_other_base=True)
    assert sorted(merged.report.experts[0]["kept"]) == ["classifier.bias", "classifier.weight"]
    assert merged.load("adapter2").config.num_labels == 2


def test_tokenizer_and_generation_config_come_from_a_named_source(family, copy):
    source = Path(copy.experts[1])
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    merged = mats_hub.merge(copy.experts, base=copy.base, method="average", tokenizer=str(source))
    assert (merged.folder / "generation_config.json").read_text() == '{\n  "max_new_tokens": 7\n}\n'
    assert (merged.folder / "chat_template.jinja").read_text() == "{{ messages }}"
    plain = mats_hub.merge(copy.experts, base=copy.base, method="average")
    assert not (plain.folder / "chat_template.jinja").exists()


def test_bad_recipes_are_refused_before_anything_is_opened():
    nowhere = ["no/one", "no/two"]
    assert "unknown method 'tise'. Did you mean 'ties'?" in problem(nowhere, method="tise")
    for density in (2, 0, -1):
        assert "initialization.density" in problem(nowhere, method="ties", density=density)
    assert "unknown option 'densty'. Did you mean 'density'?" in problem(nowhere, method="ties", densty=0.1)
    assert "has no solver to choose" in problem(nowhere, method="ties", iterations=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: [a, b]\nmetod: ties", "unknown key 'metod'. Did you mean 'method'?"),
        ("experts: [{model: a, wieght: 2}, b]", "experts.0.wieght: unknown key 'wieght'. Did you mean 'weight'?"),
        ("experts: [a]\ninitialization: {method: ties, densty: 1}", "unknown key 'densty'. Did you mean 'density'?"),
        ("method: ties", "experts is missing"),
        ("- a\n- b", "holds no mapping"),
        ("a: [", "not valid YAML"),
        ("experts: [{model: a, name: ../x}]", "experts.0.name"),
        ("experts: [{model: a, name: x}, {model: b, name: x}]", "two experts are named 'x'"),
        (
            "experts: [a]\ncurvature: {kind: gram}\nsolver: {preconditioner: kronecker}",
            "belongs to curvature kind 'kfac'",
        ),
        ("experts: [a]\nseed: -1", "seed"),
        ("experts: [a]\noutput: {max_shard_size: huge}", "output.max_shard_size"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_misspelt_recipes_name_the_key(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        mats_hub.Recipe.load(path)
    assert message in str(caught.value)


def test_recipes_survive_yaml(family):
    recipe = mats_hub.Recipe.build(
        family.experts, base=family.base, method="mats", curvature="gram", iterations=3, seed=5
    )
    assert mats_hub.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_statistics_must_belong_to_the_expert(copy):
    first, second = (Path(expert) / "statistics.safetensors" for expert in copy.experts[:2])
    shutil.copyfile(first, second)
    text = problem(copy.experts, base=copy.base, method="regmean")
    assert "StatisticsMismatch: expert 'beta' is beta (weights" in text
    assert "measured on alpha (weights" in text
    assert "Pin the expert to that commit" in text


def test_missing_statistics_of_one_module_are_an_error_or_initialized(copy):
    path = Path(copy.experts[1]) / "statistics.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    content = json.loads(metadata["mats_statistics"])
    module = "bert.encoder.layer.1.output.dense"
    del content["tokens"][module]
    for leaf in ("weight", "bias"):
        del content["uses"][f"{module}.{leaf}"]
    metadata["mats_statistics"] = json.dumps(content)
    save_file({k: v for k, v in tensors.items() if module not in k}, path, metadata=metadata)
    text = problem(copy.experts, base=copy.base, method="regmean")
    assert "expert 'beta' has no gram statistics for 'encoder.layer.1.output.dense.weight'" in text
    assert "--unmatched initialize" in text
    report = mats_hub.merge(copy.experts, base=copy.base, method="regmean", unmatched="initialize").report
    record = next(r for r in report.tensors if r.key == "encoder.layer.1.output.dense.weight")
    assert (record.action, record.reason) == ("initialize", "no statistics of beta")


@pytest.mark.parametrize("damage", ["truncate", "index", "pickle", "quantized", "config"])
def test_damaged_models_are_refused_by_name(copy, damage):
    folder = Path(copy.experts[2])
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
        expected = "is cut short"
    elif damage == "index":
        weights.unlink()
        index = {"weight_map": {"bert.pooler.dense.bias": "../../../etc/passwd"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        expected = "not a plain file name inside the repository"
    elif damage == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        expected = "as a pickle (pytorch_model.bin)"
    else:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes"}
        path.write_text(json.dumps(config) if damage == "quantized" else "{")
        expected = "is quantized (bitsandbytes)" if damage == "quantized" else "not valid JSON"
    text = problem(copy.experts, base=copy.base, method="average")
    assert text.startswith("PlanError")
    assert "gamma" in text
    assert expected in text


def test_all_problems_come_at_once(copy, tmp_path):
    weights = Path(copy.experts[2]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(PlanError) as caught:
        mats_hub.merge([*copy.experts, "not a model id", str(tmp_path / "nowhere")], base=copy.base, method="average")
    assert len(caught.value.problems) == 3
    assert "'not a model id' is neither a folder on this machine nor a Hub id" in str(caught.value)


def test_methods_on_task_vectors_need_a_base(family):
    assert "task vectors, which need the base" in problem(family.experts, method="ties")
    text = problem(family.experts, base=family.base, method="mats", solver="exact")
    assert "no closed form for kfac with 3 experts" in text


def test_two_experts_with_kfac_are_solved_exactly(family):
    merged = mats_hub.merge(family.experts[:2], base=family.base, method="mats", solver="exact")
    assert all(record.residual < max(1e-3 * record.residuals[0], 1e-6) for record in merged.report.solved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_what_the_cpu_gives(family, method):
    experts = family.experts[:2] if method == "slerp" else family.experts
    cpu, gpu = (weights(mats_hub.merge(experts, base=family.base, method=method, device=d)) for d in ("cpu", "cuda"))
    for key, value in cpu.items():
        torch.testing.assert_close(gpu[key], value, rtol=1e-3, atol=1e-4)


MEMORY = """
import resource, sys
import mats_hub
peaks = []
for layers in ("shallow", "deep"):
    folders = [f"{sys.argv[1]}/{layers}/{name}" for name in ("a", "b", "c")]
    mats_hub.merge(folders, base=f"{sys.argv[1]}/{layers}/base", method="ties", output=f"{sys.argv[1]}/{layers}/out")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    sizes = {}
    for name, layers in (("shallow", 2), ("deep", 24)):
        model = models.tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=layers)
        for index, expert in enumerate(("base", "a", "b", "c")):
            models.perturbed(model, index).save_pretrained(tmp_path / name / expert)
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name / "base").glob("*.safetensors")) / 1024
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True
    )
    growth = int(run.stdout.split()[-1])  # KiB, as the models' sizes
    assert growth < 0.1 * (sizes["deep"] - sizes["shallow"])  # of the four models that are read, 4.0 times that


def test_a_merge_without_room_is_refused_before_anything_is_written(family, tmp_path, monkeypatch):
    plan = mats_hub.make_plan(mats_hub.Recipe.build(family.experts, base=family.base, method="average"))
    assert plan.shortages(tmp_path / "not" / "there" / "yet") == []
    short = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: short)
    text = problem(family.experts, base=family.base, method="average", output=tmp_path / "out")
    assert re.search(r"ResourceError: the merge needs .* of disk under .*, but 1\.0 kB are free", text)
    monkeypatch.undo()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    text = problem(family.experts, base=family.base, method="average", output=tmp_path / "out")
    assert re.search(r"ResourceError: the merge needs about .* of memory, but 1\.0 MB are free", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_leaves_nothing_half_written(family, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        text = problem(family.experts, base=family.base, method="average", output=disk / "out")
        assert "of disk under" in text
        monkeypatch.setattr("mats_hub.plan.Plan.shortages", lambda plan, output: [])  # as when others fill it meanwhile
        text = problem(family.experts, base=family.base, method="average", output=disk / "out")
        assert "No space left on device" in text
        assert "nothing was left there" in text
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LITTLE_MEMORY = """
import resource, sys
import mats_hub
base, experts, output = sys.argv[1], sys.argv[2:4], sys.argv[4]
mats_hub.merge(experts, base=base, method="average")  # all that is imported is there then
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 40_000_000,) * 2)
try:
    mats_hub.merge(experts, base=base, method="breadcrumbs", output=output)
except mats_hub.MatsError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_memory_that_runs_out_is_an_error_and_leaves_nothing(tmp_path):
    config = BertConfig(
        vocab_size=200_000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    base = BertModel(config)
    models.save(base, tmp_path / "base", "bert")
    for seed in (1, 2):
        models.save(models.perturbed(base, seed), tmp_path / f"expert{seed}", "bert")
    folders = [str(tmp_path / name) for name in ("base", "expert1", "expert2", "out")]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LITTLE_MEMORY, *folders],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.startswith("ResourceError memory ran out while merging; about")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_model_that_transformers_does_not_know_merges_and_loading_it_says_why_not(family, tmp_path):
    """Its weights can be merged by their names; only its own code can make a model of them."""
    base = tmp_path / "base"
    shutil.copytree(family.base, base)
    models.lora_adapter(base, tmp_path / "adapter", seed=3, labels=2)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "made-up", "architectures": ["MadeUpModel"]}))
    merged = mats_hub.merge([str(tmp_path / "adapter")], base=str(base), method="average", output=tmp_path / "out")
    assert len(merged.report.files) == 1
    with pytest.raises(MatsError, match=r"made-up|MadeUpModel"):
        mats_hub.load(tmp_path / "out", task="adapter")
