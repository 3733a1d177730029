"""Every named method and every initialization, from recipe to loaded model."""

from __future__ import annotations

import models
import pytest
import torch

import mats_hub
from mats_hub import METHODS, Recipe, make_plan
from mats_hub.errors import PlanError, RecipeError
from mats_hub.recipe import INITIALIZATION_OPTIONS

DATA_FREE = [name for name, row in METHODS.items() if not row.curvature or row.curvature["kind"] == "task_vector"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Save a GPT-2 (whose weights are stored [in, out]) with two fine-tuned ones, and two LoRA adapters of it."""
    root = tmp_path_factory.mktemp("family")
    base = models.tiny_gpt2()
    models.save(base, root / "base", "gpt2")
    for seed in (1, 2):
        models.save(models.perturbed(base, seed), root / f"full{seed}", "gpt2")
        models.lora_adapter(
            root / "base", root / f"lora{seed}", seed=seed, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM",
            fan_in_fan_out=True,
        )  # fmt: skip
    return root


def experts(root, kind):
    return [str(root / f"{kind}{seed}") for seed in (1, 2)]


ON_ADAPTERS = ("average", "ties", "dare", "tsvm", "iso_cts", "knots", "consensus", "wudi")
CASES = [*((method, "full") for method in DATA_FREE), *((method, "lora") for method in ON_ADAPTERS)]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_method_that_needs_no_statistics(family, method, kind):
    merged = mats_hub.merge(experts(family, kind), base=str(family / "base"), method=method)
    assert merged.report.recipe["method"] == method
    logits = merged.load()(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()
    card = (merged.folder / "README.md").read_text()
    assert METHODS[method].title in card
    assert METHODS[method].arxiv in card


@pytest.mark.parametrize("start", INITIALIZATION_OPTIONS)
def test_every_initialization_is_a_start_for_mats(family, start):
    options = {"method": "mats", "initialization": start, "curvature": "task_vector", "iterations": 3, "damping": 0.0}
    merged = mats_hub.merge(experts(family, "full"), base=str(family / "base"), **options)
    assert merged.report.recipe["initialization"]["method"] == start
    assert merged.report.solved
    assert all(record.residual <= record.residuals[0] for record in merged.report.solved)


def test_wudi_is_mats_on_the_task_vectors_own_directions(family):
    recipe = Recipe.build(experts(family, "full"), base=str(family / "base"), method="wudi")
    assert recipe.curvature.normalization == "trace"
    assert (recipe.solver.iterations, recipe.solver.damping, recipe.initialization.scale) == (10, 0.0, 1.0)


def test_what_a_method_cannot_do_is_refused_by_the_plan(family):
    three = [*experts(family, "full"), str(family / "base")]
    plan = make_plan(Recipe.build(three, base=str(family / "base"), method="slerp"))
    assert "slerp interpolates between two experts, and there are 3" in str(plan)
    values = {"method": "consensus", "mask_scale": (0.3, 0.4, 0.5)}
    with pytest.raises(PlanError, match="mask_scale has 3 values for 2 experts"):
        mats_hub.merge(experts(family, "full"), base=str(family / "base"), **values)
    with pytest.raises(PlanError, match="iso_c works on task vectors"):
        mats_hub.merge(experts(family, "full"), method="iso_c")
    with pytest.raises(RecipeError, match="density"):
        Recipe.build(three, method="della", density=1.5)


def test_slerp_of_whole_models_needs_no_base(family):
    merged = mats_hub.merge(experts(family, "full"), method="slerp")
    based = mats_hub.merge(experts(family, "full"), base=str(family / "base"), method="slerp")
    ours, theirs = (m.load().state_dict() for m in (merged, based))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-5, rtol=1e-4)
