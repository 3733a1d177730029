"""The same merge on larger hardware: as a Job of Hugging Face."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from mats_hub import __version__
from mats_hub.errors import HubError, RecipeError, unknown
from mats_hub.hub import check_can_push
from mats_hub.hub_client import hub_api, hub_errors
from mats_hub.hub_id import is_hub_id
from mats_hub.planning import make_plan
from mats_hub.recipe import Recipe

IMAGE = "python:3.12"
GPU_IMAGE = "pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime"
PACKAGE = f"mats-hub=={__version__}"
COMMAND = (
    'python -m pip install --quiet --root-user-action=ignore "$MATS_PACKAGE" && printf "%s" "$MATS_RECIPE" > recipe.yaml && '
    'mats-hub merge recipe.yaml --stream --output merged --push "$MATS_TARGET" $MATS_FLAGS'
)

UNDER_WAY = ("SCHEDULING", "RUNNING")
PAUSE = 1.0
"""Seconds between two questions whether a Job has ended."""


def hardware(token: str | bool | None = None) -> dict[str, str]:
    """Return flavor → what it is and costs, as the Hub says now."""
    with hub_errors("the hardware of Jobs", HubError):
        listed = hub_api(token).list_jobs_hardware()
    found = {}
    for kind in listed:
        gpu = f", {kind.accelerator.quantity} × {kind.accelerator.model}" if kind.accelerator else ""
        found[str(kind.name)] = f"{kind.cpu}, {kind.ram}{gpu}, ${kind.unit_cost_usd:g} per {kind.unit_label}"
    return found


def submit(
    recipe: Recipe,
    target: str,
    flavor: str,
    *,
    private: bool = False,
    timeout: str = "6h",
    package: str = PACKAGE,
    token: str | bool | None = None,
) -> Any:
    """Have a Job merge a recipe and publish the result; return the Hub client's description of the Job.

    The recipe is planned and pinned here first. The token goes as a secret, which the Hub keeps encrypted; experts are streamed,
    so that the Job's disk holds the result alone. The Job is paid for by whose token it is.

    Args:
        recipe: what to merge, from models on the Hub alone.
        target: the repository to publish it in, ``owner/name``.
        flavor: the hardware, one of `hardware`.
        private: whether a repository that is made is private.
        timeout: after which the Job is stopped, such as ``90m``.
        package: what pip installs in the Job.
        token: Hub token; the one stored on this machine otherwise.

    Raises:
        PlanError: what stands in the way of the merge.
        RecipeError: the flavor is unknown, or a model of the recipe is not on the Hub.
        HubError: the Job was not accepted.

    """
    from huggingface_hub import get_token

    flavors = hardware(token)
    if flavor not in flavors:
        raise RecipeError(unknown("flavor", flavor, flavors))
    check_can_push(target, token)
    plan = make_plan(recipe, token, stream=True)
    plan.raise_problems()
    wanted = plan.recipe
    named = [wanted.base, wanted.tokenizer, *(name for e in wanted.experts for name in (e.model, e.statistics))]
    for name in named:
        if name is not None and ("@" not in name or not is_hub_id(name.partition("@")[0])):
            raise RecipeError(
                f"a Job reads models and statistics from the Hub, but {name!r} is on this machine; publish it first"
            )
    secret = token if isinstance(token, str) else get_token()
    with hub_errors("the Job", HubError):
        return hub_api(token).run_job(
            image=GPU_IMAGE if "×" in flavors[flavor] else IMAGE,
            command=["bash", "-c", COMMAND],
            env={
                "MATS_RECIPE": plan.recipe.to_yaml(),
                "MATS_TARGET": target,
                "MATS_PACKAGE": package,
                "MATS_FLAGS": "--private" if private else "",
            },
            secrets={"HF_TOKEN": secret},
            flavor=flavor,
            timeout=timeout,
            labels={"library": "mats_hub"},
        )


def follow(job: Any, token: str | bool | None = None) -> Iterator[str]:
    """Give a Job's log line by line until it ends.

    Raises:
        HubError: it did not end well.

    """
    api = hub_api(token)
    with hub_errors(f"Job {job.id}", HubError):
        yield from api.fetch_job_logs(job_id=job.id, namespace=job.owner.name, follow=True)
        while True:  # its log may end before the Hub says that it has
            ended = api.inspect_job(job_id=job.id, namespace=job.owner.name)
            if str(ended.status.stage) not in UNDER_WAY:
                break
            time.sleep(PAUSE)
    if str(ended.status.stage) != "COMPLETED":
        raise HubError(
            f"Job {job.id} ended as {ended.status.stage} ({ended.status.message or 'no message'}); see {job.url}"
        )
