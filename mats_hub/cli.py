"""The command line: parse, make one public call, print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from mats_hub import __version__
from mats_hub.errors import MatsError
from mats_hub.hf_extension import program_name
from mats_hub.methods import METHODS
from mats_hub.progress import progress_bar
from mats_hub.recipe import (
    INITIALIZATION_OPTIONS,
    OPTION_OWNERS,
    PARTS,
    Curvature,
    ExpertEntry,
    Recipe,
    Solver,
)

EXPERT_OPTIONS = ("name", "weight", "statistics")
"""Fields of an expert that the command line takes as one value per expert, in their order."""

DATA_OPTIONS: dict[str, str] = {
    "dataset": "Hub id 'owner/name[@revision]', or a JSONL, CSV or Parquet file; a causal language model can do without, and is "
    "measured on text that it generates itself",
    "config": "the data set's configuration",
    "split": "the data set's split",
    "label": "label column; inferred from usual names otherwise",
    "image": "image column",
    "target": "target text column",
    "audio": "column of sounds",
    "messages": "column of conversations, put through the chat template; only the assistant's tokens count",
    "labels": "data (empirical Fisher) or model (true Fisher: drawn from its predictions)",
    "task": "the kind of task, when the model's class does not tell",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, or 1 after an error that was explained."""
    # Read when torch is loaded, which no command has done yet: threads that spin while they wait are an order of magnitude
    # slower on a machine with anything else to do.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["statistics"] and given[1:2] in (["info"], ["push"]):
        given[:2] = [f"statistics-{given[1]}"]
    arguments = vars(_parser().parse_args(given))
    command = arguments.pop("run")
    try:
        return int(command(**arguments) or 0)
    except MatsError as error:
        print(f"mats-hub: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mats-hub: stopped; nothing was left half-written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name(),
        description="Merge fine-tuned models from the Hugging Face Hub into one that does all their tasks.",
        epilog="Methods:\n" + "\n".join(f"  {name:16}{method.summary}" for name, method in METHODS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mats-hub {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="train three small experts, merge them with four methods, compare; works offline"
    )
    demo.add_argument("--output", default="mats-demo", help="folder to write (default: %(default)s)")
    demo.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    demo.set_defaults(run=_demo)

    _add_statistics(commands)
    info = commands.add_parser("statistics-info", help="print what a statistics file holds; also: statistics info FILE")
    info.add_argument("file", help="the statistics file")
    info.set_defaults(run=_statistics_info)
    publish = commands.add_parser(
        "statistics-push", help="publish a statistics file where merges find it; also: statistics push FILE"
    )
    publish.add_argument("file", help="the statistics file")
    publish.add_argument(
        "repo_id", metavar="OWNER/NAME", nargs="?", help="where to; the expert's own repository otherwise"
    )
    publish.add_argument("--private", action="store_true", help="make a new repository private")
    publish.add_argument("--create-pr", action="store_true", default=None, help="open a pull request in any case")
    publish.set_defaults(run=_statistics_push)
    plan = commands.add_parser(
        "plan", help="show what a merge would do to every tensor, and every problem, without doing it"
    )
    _add_recipe_flags(plan)
    plan.set_defaults(run=_plan)

    merge = commands.add_parser("merge", help="merge experts, from a recipe file or from flags")
    _add_recipe_flags(merge)
    merge.add_argument("--output", required=True, help="folder to write; it must not exist or be empty")
    merge.add_argument("--push", metavar="OWNER/NAME", help="publish the result there")
    merge.add_argument("--private", action="store_true", help="make the published repository private")
    merge.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    merge.set_defaults(run=_merge)

    push = commands.add_parser("push", help="publish a merged model's folder")
    push.add_argument("folder", help="the merged model")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="where to")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.set_defaults(run=_push)
    _add_browsing(commands)
    page = commands.add_parser("ui", help="open the page in which all this is done by clicking, on this machine")
    page.add_argument("--port", type=int, help="where to serve it; the first free one from 7860 on otherwise")
    page.set_defaults(run=_ui)
    register = commands.add_parser("register-cli", help="make 'hf mats' run this program, offline")
    register.set_defaults(run=_register)
    return parser


def _add_browsing(commands: Any) -> None:
    browse = commands.add_parser("browse", help="list merges on the Hub that carry a recipe")
    browse.add_argument("query", nargs="?", help="words in the id")
    browse.add_argument("--author", help="user or organization")
    browse.add_argument("--base", metavar="OWNER/NAME", help="a model they are made from, the base or an expert")
    browse.add_argument("--limit", type=int, default=20, help="at most so many (default: %(default)s)")
    browse.set_defaults(run=_browse)
    show = commands.add_parser("show", help="print a model's card, and what it was made from as a tree")
    show.add_argument("model", help="Hub id 'owner/name[@revision]' or a folder")
    show.add_argument("--lineage", action="store_true", help="the tree alone")
    show.set_defaults(run=_show)
    replay = commands.add_parser("replay", help="make a published merge again from its recipe, and compare")
    replay.add_argument("model", help="the merge: Hub id 'owner/name[@revision]' or a folder")
    replay.add_argument("--check", action="store_true", help="compare only; exit status 1 when a tensor differs")
    replay.add_argument("--change", action="append", metavar="NAME=VALUE", help="make a variant with another option")
    replay.add_argument("--output", help="folder to write; it must not exist or be empty")
    replay.add_argument("--push", metavar="OWNER/NAME", help="publish the result there")
    replay.add_argument("--private", action="store_true", help="make the published repository private")
    replay.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    replay.set_defaults(run=_replay)


def _add_statistics(commands: Any) -> None:
    statistics = commands.add_parser("statistics", help="measure an expert's statistics on its task's data")
    statistics.add_argument("model", help="Hub id 'owner/name[@revision]' or a folder")
    statistics.add_argument(
        "--kind",
        action="append",
        help="gram, kfac, fisher or block_fisher; may be given more than once (default: kfac; for (IA)³ block_fisher)",
    )
    statistics.add_argument(
        "--modules",
        default="touched",
        help="of an adapter: touched (what it changes) or all (default: %(default)s)",
    )
    statistics.add_argument(
        "--for-adapter",
        action="store_true",
        help="of a LoRA adapter: only what merging it into an adapter needs, a few MB",
    )
    statistics.add_argument(
        "--rank", type=int, help="measure sketches of so many columns, not whole Grams (64 with --for-adapter)"
    )
    statistics.add_argument("--text", action="append", default=[], help="text column; give it twice for sentence pairs")
    for name, text in DATA_OPTIONS.items():
        default = {"default": "data"} if name == "labels" else {}
        statistics.add_argument(f"--{name}", help=text, **default)
    statistics.add_argument("--base", help="an adapter's base, when it is not the one it names")
    statistics.add_argument("--examples", type=int, default=1000, help="at most so many (default: %(default)s)")
    statistics.add_argument(
        "--batch-size", type=int, default=16, help="results do not depend on it (default: %(default)s)"
    )
    statistics.add_argument("--max-length", type=int, help="tokens after which a text is cut")
    statistics.add_argument("--seed", type=int, default=0, help="of the draw of examples (default: %(default)s)")
    statistics.add_argument("--dtype", default="float32", help="what the model runs in (default: %(default)s)")
    statistics.add_argument("--storage", default="float32", help="float32, float16 or bfloat16 (default: %(default)s)")
    statistics.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    statistics.add_argument("--device-map", help="auto: spread a model that is larger than a device over several")
    statistics.add_argument(
        "--memory", help="what sums may take, such as 8GB, in more passes if need be; what is free otherwise"
    )
    statistics.add_argument("--output", help="file to write (default: NAME.statistics.safetensors)")
    statistics.add_argument(
        "--push",
        metavar="OWNER/NAME",
        nargs="?",
        const="",
        help="publish them: in the expert's repository, or in this one",
    )
    statistics.set_defaults(run=_statistics)


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of the recipe's schema."""
    parser.add_argument(
        "experts", nargs="+", metavar="MODEL", help="a recipe file (.yaml), or Hub ids or folders of experts"
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


def _recipe(options: dict[str, Any]) -> Recipe:
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


def _demo(output: str, device: str) -> None:
    from mats_hub.demo import run_demo

    run_demo(output, device, progress_bar, print)


def _statistics(model: str, output: str | None, kind: list[str] | None, push: str | None, **options: Any) -> None:
    from mats_hub.statistics import compute_statistics

    name = model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    target = output or f"{name}.statistics.safetensors"
    statistics = compute_statistics(model, kind=kind, output=target, progress=progress_bar, **options)
    if statistics.path is None:  # one of several processes, of which the first has written the file
        return
    found, target = statistics.provenance, str(statistics.path)
    print(f"{target}: {', '.join(found.kinds)} of {found.model} on {found.examples} examples, {found.tokens} tokens")
    if push is None:
        print(
            f"next: mats-hub merge {model} … --statistics {target} … --output merged/, or mats-hub statistics push {target}"
        )
    else:
        _statistics_push(target, push or None)


def _statistics_info(file: str) -> None:
    from mats_hub.statistics import Statistics

    print(Statistics.load(file))


def _statistics_push(file: str, repo_id: str | None, private: bool = False, create_pr: bool | None = None) -> None:
    from mats_hub.hub import push_statistics

    print(push_statistics(file, repo_id, private=private, create_pr=create_pr))


def _plan(**options: Any) -> int:
    from mats_hub.planning import make_plan

    plan = make_plan(_recipe(options))
    print(plan)
    return 1 if plan.problems else 0


def _merge(output: str, push: str | None, private: bool, device: str, **options: Any) -> None:
    from mats_hub.merged_model import merge

    if push:
        _check_can_push(push)
    merged = merge(_recipe(options), output=output, device=device, progress=progress_bar)
    for note in merged.report.notes:
        print(f"note: {note}")
    print(f"merged {len(merged.report.experts)} experts with {merged.report.recipe['method']} into {output}")
    if push:
        print(merged.push_to_hub(push, private=private))
    else:
        print(f"next: read {output}/README.md, then mats-hub push {output} OWNER/NAME")


def _check_can_push(repo_id: str) -> None:
    from mats_hub.hub import check_can_push

    check_can_push(repo_id)


def _push(folder: str, repo_id: str, private: bool, create_pr: bool) -> None:
    from mats_hub.hub import push

    print(push(folder, repo_id, private=private, create_pr=create_pr))


def _browse(query: str | None, author: str | None, base: str | None, limit: int) -> None:
    from mats_hub.browsing import browse

    merges = browse(query, author=author, base=base, limit=limit)
    if not merges:
        print("no merge of this package was found; look with fewer words, or without --author and --base")
        return
    rows = [("model", "method", "experts", "base", "results", "likes", "changed")]
    for merge in merges:
        results = f"{merge.mean:.3f} (mean of {len(merge.results)})" if merge.mean is not None else "–"
        changed = f"{merge.modified:%Y-%m-%d}" if merge.modified else "–"
        experts, base = ", ".join(merge.experts) or "–", merge.base or "–"
        rows.append((merge.repo_id, merge.method, experts, base, results, str(merge.likes), changed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(model: str, lineage: bool) -> None:
    from mats_hub import browsing

    if not lineage:
        print(browsing.read_card(model).rstrip() + "\n\nLineage:")
    print(browsing.lineage(model))


def _replay(
    model: str, check: bool, change: list[str] | None, output: str | None, push: str | None, private: bool, device: str
) -> int:
    import yaml

    from mats_hub.errors import RecipeError
    from mats_hub.replaying import replay

    if check and (change or push or output):
        raise RecipeError("--check only compares; leave out --change, --output and --push, or leave out --check")
    if not (check or output or push):
        raise RecipeError("say what the result is for: --check, --output FOLDER or --push OWNER/NAME")
    if push:
        _check_can_push(push)
    changes = {}
    for pair in change or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--change {pair!r}: write NAME=VALUE, such as --change scale=0.4")
        changes[name.replace("-", "_")] = yaml.safe_load(value)
    made = replay(model, output=output, changes=changes or None, device=device, progress=progress_bar)
    if not changes:
        print(made)
    if output:
        print(f"written: {output}")
    if push:
        print(made.merged.push_to_hub(push, private=private))
    return 1 if check and not made.identical else 0


def _ui(port: int | None) -> None:
    from pathlib import Path

    from mats_hub.errors import OutputError

    here = Path(__file__).parent
    folder = next((f for f in (here / "space", here.parent / "space") if (f / "app.py").is_file()), None)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        raise OutputError("the page needs Gradio; install it with pip install 'mats-hub[ui]'") from None
    if folder is None:
        raise OutputError("this installation has no page (space/); install mats-hub again")
    sys.path.insert(0, str(folder))
    from app import serve

    serve(port)


def _register() -> None:
    from mats_hub.hf_extension import register

    print(f"written: {register()}; 'hf mats --help' works now")


if __name__ == "__main__":
    sys.exit(main())
