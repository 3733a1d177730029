"""Configurations of mergekit, read as recipes."""

from __future__ import annotations

from typing import Any

import family as families
import pytest
import torch
import yaml
from safetensors.torch import load_file

import mats_hub
from mats_hub.cli import main
from mats_hub.errors import RecipeError
from mats_hub.recipe import Recipe


def config(method: str, parameters: dict[str, Any] | None = None, *each: dict[str, Any], **more: Any) -> str:
    """Return a configuration of two models, with parameters of all and of each."""
    models = [{"model": f"me/{name}", "parameters": own} for name, own in zip("ab", each or ({}, {}), strict=True)]
    content = {
        "merge_method": method,
        "models": models,
        "base_model": "me/base",
        "parameters": parameters or {},
        **more,
    }
    return yaml.safe_dump(content)


W = ({"weight": 0.5}, {"weight": 1.5})


@pytest.mark.parametrize(
    ("text", "weights", "options"),
    [
        (config("linear", None, *W), (0.5, 1.5), {"method": "average"}),
        (config("linear", {"normalize": False}, {"weight": 0.4}, {"weight": 0.6}), (0.4, 0.6), {"method": "average"}),
        (config("task_arithmetic", {"lambda": 0.7}, *W), (0.5, 1.5), {"method": "task_arithmetic", "scale": 0.7}),
        (config("task_arithmetic", {"normalize": True}, *W), (0.5, 1.5), {"method": "task_arithmetic", "scale": 0.5}),
        (
            config("ties", {"density": 0.3, "int8_mask": True, "weight": 2}),
            (2, 2),
            {"method": "ties", "density": 0.3, "trim": "per_tensor", "scale": 1, "fuse": "mean"},
        ),
        (
            config("ties", {"normalize": False}, {"weight": 1, "density": "5e-1"}, {"density": 0.5}),
            (1, 1),
            {"method": "ties", "density": 0.5, "trim": "per_tensor", "scale": 1, "fuse": "sum"},
        ),
        (config("dare_linear", {"density": 0.6}, *W), (0.5, 1.5), {"method": "dare", "density": 0.6, "scale": 1}),
        (
            config("dare_ties", {"density": 0.6, "normalize": 1}),
            (1, 1),
            {"method": "dare_ties", "density": 0.6, "scale": 1, "fuse": "mean"},
        ),
        (
            config("della", {"density": 0.6, "lambda": 1.1}),
            (1, 1),
            {"method": "della", "density": 0.6, "scale": 1.1, "epsilon": 0.15, "fuse": "mean"},
        ),
        (config("della"), (1, 1), {"method": "della", "density": 1, "scale": 1, "epsilon": 0, "fuse": "mean"}),
        (
            config("breadcrumbs", {"density": 0.9, "gamma": 0.02}),
            (1, 1),
            {"method": "breadcrumbs", "density": 0.9, "scale": 1, "outliers": 0.02},
        ),
        (config("model_stock"), (1, 1), {"method": "model_stock"}),
        (
            config("model_stock", dtype="bfloat16", out_dtype="float16"),
            (1, 1),
            {"method": "model_stock", "dtype": "float16"},
        ),
        (config("linear", tokenizer_source="base"), (1, 1), {"method": "average", "tokenizer": "me/base"}),
        (config("linear", tokenizer={"source": "me/a"}), (1, 1), {"method": "average", "tokenizer": "me/a"}),
    ],
)
def test_the_same_merge_is_asked_for(text, weights, options):
    experts = [{"model": f"me/{name}", "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    assert Recipe.from_yaml(text) == Recipe.build(experts, base="me/base", **options)


def test_the_base_among_the_models_is_an_expert_only_where_weights_are_merged():
    models = [{"model": "me/base"}, {"model": "me/a", "parameters": {"weight": 0.5}}]
    content = {"models": models, "base_model": "me/base"}
    assert [e.model for e in Recipe.from_mapping(content | {"merge_method": "ties"}).experts] == ["me/a"]
    assert [e.model for e in Recipe.from_mapping(content | {"merge_method": "linear"}).experts] == ["me/base", "me/a"]


def test_an_arc_goes_from_the_base_to_the_other():
    for models in (["me/a", "me/b"], ["me/b", "me/a"], ["me/a"]):
        content = {"models": [{"model": name} for name in models], "base_model": "me/b", "merge_method": "slerp"}
        recipe = Recipe.from_mapping(content | {"parameters": {"t": 0.25}})
        assert [(expert.model, expert.weight) for expert in recipe.experts] == [("me/b", 0.75), ("me/a", 0.25)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (config("passthrough"), "merge_method: unknown value 'passthrough'"),
        (config("dare_tie"), "Did you mean 'dare_ties'"),
        (config("ties", slices=[]), "'slices', which cannot be taken over; name whole models"),
        (config("ties", chat_template="auto"), "'chat_template'.*'tokenizer'"),
        (config("ties", None, {"density": 0.5}, {"density": 0.3}), r"'density' differs by model \(\[0.3, 0.5\]\)"),
        (
            config("ties", None, {"weight": [0, 0.5, 1]}, {}),
            "models.0.parameters.weight: Input should be a valid number",
        ),
        (config("slerp", {"t": [{"filter": "mlp", "value": 0.5}]}), "parameters.t: Input should be a valid number"),
        (config("slerp"), "parameters.t is missing"),
        (config("slerp", {"t": 0.5}), "to one other model, and there are 3 with it"),
        (config("ties", {"dens": 0.5}), "parameters.dens: unknown key 'dens'. Did you mean 'density'"),
        (config("ties", {"rescale": True}), "ties never rescales"),
        (config("linear", {"normalize": False}, *W), "have to sum to 1, and these to 2"),
        (config("linear", tokenizer_source="union"), "tokenizer 'union' cannot be taken over"),
        (config("linear", dtype="float8"), "dtype"),
        (yaml.safe_dump({"merge_method": "ties"}), "models is missing"),
        (yaml.safe_dump({"merge_method": "ties", "models": ["me/a"]}), "models.0"),
        (yaml.safe_dump({"merge_method": "ties", "models": [{"model": "me/a+me/lora"}]}), "models.0.model"),
        (yaml.safe_dump({"merge_method": ["ties"], "models": []}), "method"),
        (yaml.safe_dump({"merge_method": "ties", "models": [{"model": "me/a", "parameters": 3}]}), "parameters"),
        (yaml.safe_dump({"merge_method": "ties", "models": [{"model": "me/a"}], "parameters": [1]}), "parameters"),
    ],
)
def test_what_has_no_equal_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(text)


def test_it_is_merged_like_any_other_recipe(tmp_path):
    made = families.make_family(tmp_path)
    models = [{"model": path, "parameters": {"weight": 0.5}} for path in made.experts]
    content = {"merge_method": "task_arithmetic", "models": models, "base_model": str(made.base)}
    (tmp_path / "mergekit_config.yml").write_text(yaml.safe_dump(content))
    assert main(["merge", str(tmp_path / "mergekit_config.yml"), "--output", str(tmp_path / "merged")]) == 0
    ours = mats_hub.merge(
        [{"model": path, "weight": 0.5} for path in made.experts],
        base=str(made.base),
        method="task_arithmetic",
        scale=1.0,
    )
    merged, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", ours.folder))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
