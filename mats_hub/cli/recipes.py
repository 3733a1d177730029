"""Commands that take a recipe: a flag for every field of its schema."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mats_hub.progress import progress_bar
from mats_hub.recipe import INITIALIZATION_OPTIONS, OPTION_OWNERS, PARTS, Curvature, ExpertEntry, Recipe, Solver

EXPERT_OPTIONS = ("name", "weight", "statistics")
"""Fields of an expert that the command line takes as one value per expert, in their order."""

STREAM = "read experts from the Hub tensor by tensor, and keep none of them on this machine"


def add_commands(commands: Any) -> None:
    """Add the commands `plan`, `agreement`, `merge` and `push`."""
    plan = commands.add_parser(
        "plan", help="show what a merge would do to every tensor, and every problem, without doing it"
    )
    add_recipe_flags(plan)
    plan.add_argument("--stream", action="store_true", help=STREAM)
    plan.set_defaults(run=_plan)

    agreement = commands.add_parser(
        "agreement", help="show where experts agree and where they pull apart: cosines and sign conflicts by layer"
    )
    add_recipe_flags(agreement)
    agreement.add_argument("--figure", metavar="FILE.png", help="draw them as heat maps, too")
    agreement.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    agreement.set_defaults(run=_agreement)

    merge = commands.add_parser("merge", help="merge experts, from a recipe file or from flags")
    add_recipe_flags(merge)
    merge.add_argument("--output", help="folder to write; it must not exist or be empty")
    merge.add_argument("--push", metavar="OWNER/NAME", help="publish the result there")
    merge.add_argument("--private", action="store_true", help="make the published repository private")
    merge.add_argument("--stream", action="store_true", help=STREAM)
    merge.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    merge.add_argument(
        "--job", metavar="FLAVOR", help="merge as a Job of Hugging Face on this hardware, such as cpu-xl"
    )
    merge.add_argument("--job-timeout", default="6h", help="after which a Job is stopped (default: %(default)s)")
    merge.add_argument("--job-package", help="what pip installs in a Job; this version of mats-hub otherwise")
    merge.set_defaults(run=_merge)

    push = commands.add_parser("push", help="publish a merged model's folder")
    push.add_argument("folder", help="the merged model")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="where to")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.set_defaults(run=_push)


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of the recipe's schema."""
    parser.add_argument(
        "experts",
        nargs="+",
        metavar="MODEL",
        help="a recipe file (.yaml), also one of mergekit's; or Hub ids or folders of experts",
    )
    for name in EXPERT_OPTIONS:
        field = ExpertEntry.model_fields[name]
        parser.add_argument(f"--{name}", nargs="+", help=f"one per expert: {field.description}")
    parser.add_argument("--initialization", help=", ".join(INITIALIZATION_OPTIONS))
    parser.add_argument("--curvature", help=Curvature.model_fields["kind"].description)
    parser.add_argument("--solver", help=Solver.model_fields["method"].description)
    for name, field in Recipe.model_fields.items():
        if name in ("experts", "initialization", "curvature", "solver", "output"):
            continue
        kind: dict[str, Any] = {}
        if field.annotation is bool:
            kind = {"action": "store_true", "default": None}
        elif name in ("include", "exclude", "keep_per_task"):
            kind = {"action": "append", "metavar": "PATTERN"}
        parser.add_argument(_flag(name), help=field.description, **kind)
    for name, owner in OPTION_OWNERS.items():
        holders = [PARTS[owner]] if owner in PARTS else INITIALIZATION_OPTIONS.values()
        described = next(holder.model_fields[name] for holder in holders if name in holder.model_fields)
        several: dict[str, Any] = {"nargs": "+"} if isinstance(described.default, tuple) else {}
        parser.add_argument(_flag(name), help=f"{owner}: {described.description}", **several)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_recipe(options: dict[str, Any]) -> Recipe:
    """Return the recipe that the flags describe."""
    from mats_hub.errors import RecipeError

    experts: list[str] = options.pop("experts")
    per_expert = {name: options.pop(name) for name in EXPERT_OPTIONS}
    given = {name: value for name, value in {**options, **per_expert}.items() if value is not None}
    if experts[0].endswith((".yaml", ".yml")):
        if len(experts) > 1 or given:
            extra = ", ".join([*experts[1:], *(_flag(name) for name in given)])
            raise RecipeError(f"a recipe file stands alone, but there is also {extra}; write it into {experts[0]}")
        return Recipe.load(experts[0])
    entries: list[dict[str, Any]] = [{"model": expert} for expert in experts]
    for name, values in per_expert.items():
        if values is None:
            continue
        if len(values) != len(experts):
            raise RecipeError(
                f"--{name} has {len(values)} values for {len(experts)} experts; give one for each, in their order"
            )
        for entry, value in zip(entries, values, strict=True):
            entry[name] = value
    return Recipe.build(entries, **options)


def _plan(stream: bool, **options: Any) -> int:
    from mats_hub.planning import make_plan

    plan = make_plan(read_recipe(options), stream=stream)
    print(plan)
    return 1 if plan.problems else 0


def _agreement(figure: str | None, device: str, **options: Any) -> None:
    from mats_hub.conflict import agreement, by_layer, draw, table

    layers = by_layer(agreement(read_recipe(options), device=device, progress=progress_bar))
    print(table(layers))
    if figure:
        draw(layers, Path(figure))
        print(f"\ndrawn: {figure}")


def _merge(
    output: str | None,
    push: str | None,
    private: bool,
    device: str,
    stream: bool,
    job: str | None,
    job_timeout: str,
    job_package: str | None,
    **options: Any,
) -> None:
    from mats_hub.errors import RecipeError
    from mats_hub.hub import Upload
    from mats_hub.merged_model import merge
    from mats_hub.processes import is_first

    recipe, upload = read_recipe(options), None
    if job:
        if not push:
            raise RecipeError("a Job publishes what it makes: say where with --push OWNER/NAME")
        return _merge_as_job(recipe, push, job, private=private, timeout=job_timeout, package=job_package)
    if not output:
        raise RecipeError("say where to write the merged model: --output FOLDER")
    if push:
        check_can_push(push)
        upload = Upload(push, private=private)
    on_file = upload.add if upload else None
    merged = merge(recipe, output=output, device=device, stream=stream, progress=progress_bar, on_file=on_file)
    if not is_first():
        return
    for note in merged.report.notes:
        print(f"note: {note}")
    print(f"merged {len(merged.report.experts)} experts with {merged.report.recipe['method']} into {output}")
    if push:
        print(merged.push_to_hub(push, private=private, upload=upload))
    else:
        print(f"next: read {output}/README.md, then mats-hub push {output} OWNER/NAME")


def _merge_as_job(recipe: Recipe, target: str, flavor: str, package: str | None, **options: Any) -> None:
    from mats_hub import jobs

    job = jobs.submit(recipe, target, flavor, package=package or jobs.PACKAGE, **options)
    print(f"{flavor}: {jobs.hardware()[flavor]}\n{job.url}", flush=True)
    for line in jobs.follow(job):
        print(line, flush=True)


def option_name(flag: str) -> str:
    """Return an option as recipes call it; the name of an expert in it stays as it is."""
    option, dot, expert = flag.partition(".")
    return option.replace("-", "_") + dot + expert


def check_can_push(repo_id: str) -> None:
    """Refuse a repository that this machine's token may not write to, before any work is done for it."""
    from mats_hub.hub import check_can_push

    check_can_push(repo_id)


def _push(folder: str, repo_id: str, private: bool, create_pr: bool) -> None:
    from mats_hub.hub import push

    print(push(folder, repo_id, private=private, create_pr=create_pr))
