"""What programs may ask the page: its API's and its MCP server's named actions. None of them writes anything."""

from __future__ import annotations

from typing import Any

import gradio as gr
from example_experts import check_ids
from merge_actions import EXAMPLE_EXPERTS, JOBS, ON_A_SPACE

import mats_hub
from mats_hub import MatsError, Recipe


def plan_recipe(recipe: str, authorization: gr.Header | None = None) -> str:
    """Say what a merge would do to every tensor, and every problem, without doing it.

    Args:
        recipe: the recipe as YAML, with Hub ids.
        authorization: a Hub token as ``Bearer hf_…``, for private and gated models.

    """
    try:
        recipe_here = check_ids(Recipe.from_yaml(recipe), EXAMPLE_EXPERTS)
        return str(mats_hub.make_plan(recipe_here, header_token(authorization)))
    except (MatsError, ValueError) as error:
        raise gr.Error(str(error)) from None


def browse_merges(words: str = "", author: str = "") -> list[dict[str, Any]]:
    """List merges on the Hub that carry a recipe: id, method, experts, base, mean result.

    Args:
        words: words in the id.
        author: user or organization.

    """
    return [
        {"id": m.repo_id, "method": m.method, "experts": list(m.experts), "base": m.base, "mean": m.mean}
        for m in mats_hub.browse(words or None, author=author or None, token=False if ON_A_SPACE else None)
    ]


def inspect_model(model: str, base: str = "", authorization: gr.Header | None = None) -> dict[str, Any]:
    """Say what a model is, from its configs and headers: kind, base, bytes of weights, licence, whether statistics are beside it.

    Args:
        model: the model's Hub id, ``owner/name`` or ``owner/name@revision``.
        base: the Hub id of the base of a full checkpoint.
        authorization: a Hub token as ``Bearer hf_…``, for private and gated models.

    """
    try:
        recipe = check_ids(Recipe.build([model], base=base or None, method="average"), EXAMPLE_EXPERTS)
        plan = mats_hub.make_plan(recipe, header_token(authorization))
        plan.raise_problems()
    except (MatsError, ValueError) as error:
        raise gr.Error(str(error)) from None
    [expert] = plan.experts
    return {
        "model": expert.source.public_spec,
        "kind": expert.kind,
        "base": plan.base.source.public_spec if plan.base else None,
        "bytes": sum(expert.source.sizes[name] for name in expert.source.weight_files),
        "license": expert.source.front_matter.get("license"),
        "statistics": any(name.startswith("statistics") for name in expert.source.sizes),
    }


def merge_status(run: str) -> dict[str, Any]:
    """Say where a merge of this page is: its state, the step it is at, what went wrong.

    Args:
        run: the id that stands in the merge's link, after ``?run=``.

    """
    job = JOBS.get(run)
    if job is None:
        raise gr.Error("There is no such merge, or not any more; merges are kept for an hour.")
    now = job.progress_file.read()
    return {"state": job.state, "error": job.error} | {name: now[name] for name in ("step", "done", "total")}


def header_token(authorization: Any) -> str | bool | None:
    """Return the token of a program's request; on a Space never the server's own."""
    return str(authorization).removeprefix("Bearer ") if authorization else (False if ON_A_SPACE else None)
