"""Commands that score models on their tasks, and choose methods and settings by it."""

from __future__ import annotations

from typing import Any

from mats_hub.cli.recipes import add_recipe_flags, option_name, read_recipe
from mats_hub.progress import progress_bar

TASKS = "file of tasks: name → dataset, validation and test part, metric (see the README)"


def add_commands(commands: Any) -> None:
    """Add the commands `evaluate`, `tune` and `compare`."""
    evaluate = commands.add_parser("evaluate", help="score a merged model on its tasks, beside its experts")
    evaluate.add_argument("model", help="the merged model: a folder or a Hub id")
    evaluate.add_argument("--tasks", help=TASKS)
    evaluate.add_argument("--part", default="test", choices=("test", "validation"), help="default: %(default)s")
    evaluate.add_argument("--experts", nargs="+", metavar="TASK=MODEL", help="experts to compare with")
    evaluate.add_argument(
        "--base", help="an adapter's base, when it is not the one it names; or the model that it is a part of"
    )
    evaluate.add_argument("--add", action="store_true", help="add the results to the folder's report and card")
    evaluate.add_argument("--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness instead")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    evaluate.set_defaults(run=_evaluate)

    tune = commands.add_parser(
        "tune", help="try settings of a merge on validation data, and write the best as a recipe"
    )
    add_recipe_flags(tune)
    tune.add_argument("--tasks", required=True, help=TASKS)
    tune.add_argument(
        "--grid",
        action="append",
        metavar="NAME=V1,V2,…",
        help="values to try, of weight.EXPERT, too; a usual grid otherwise",
    )
    tune.add_argument(
        "--for", dest="only", nargs="+", default=(), metavar="TASK", help="tasks that count; all otherwise"
    )
    tune.add_argument("--output", required=True, help="folder for best.yaml, scores.json and scores.png")
    tune.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    tune.set_defaults(run=_tune)

    compare = commands.add_parser("compare", help="merge by several methods on one reading, and score each")
    add_recipe_flags(compare)
    compare.add_argument("--tasks", required=True, help=TASKS)
    compare.add_argument("--methods", default="all", help="names with commas between (default: %(default)s)")
    compare.add_argument(
        "--tune", action="store_true", help="choose each method's settings on the validation part first"
    )
    compare.add_argument("--part", default="validation", choices=("test", "validation"), help="default: %(default)s")
    compare.add_argument("--output", required=True, help="folder for best.yaml, scores.json and scores.png")
    compare.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    compare.set_defaults(run=_compare)


def _evaluate(
    model: str,
    tasks: str | None,
    part: str,
    experts: list[str] | None,
    base: str | None,
    add: bool,
    lm_eval: list[str] | None,
    device: str,
) -> None:
    from mats_hub.choosing import evaluate_tasks, harness
    from mats_hub.errors import RecipeError
    from mats_hub.merged_model import MergedModel
    from mats_hub.scoring import relative

    if (tasks is None) == (lm_eval is None):
        raise RecipeError("say on what: --tasks FILE, or --lm-eval TASK … of lm-evaluation-harness")
    named = {}
    for pair in experts or ():
        task, equals, expert = pair.partition("=")
        if not equals:
            raise RecipeError(f"--experts {pair!r}: write TASK=MODEL")
        named[task] = expert
    if lm_eval:
        rows = harness(model, lm_eval, device)
    else:
        assert tasks
        rows = evaluate_tasks(model, tasks, part=part, experts=named, base=base, device=device)
    beside = {row["task"]: row["value"] for row in rows if row["model"] == "expert"}
    for row in rows:
        if row["model"] == "merged":
            name, value = row["task"], row["value"]
            ratio = (
                f"  (expert {beside[name]:.4f}, {relative(value, beside[name], row['metric']):.3f} of it)"
                if name in beside
                else ""
            )
            print(f"{name}: {row['metric']} {value:.4f}{ratio}")
    if add:
        MergedModel.open(model).add_results(rows)
        print(f"added to {model}/README.md")


def _grid(pairs: list[str] | None) -> dict[str, list[Any]] | None:
    import yaml

    from mats_hub.errors import RecipeError

    grid = {}
    for pair in pairs or ():
        name, equals, values = pair.partition("=")
        if not equals or not values:
            raise RecipeError(f"--grid {pair!r}: write NAME=V1,V2,…, such as --grid scale=0.3,0.5")
        grid[option_name(name)] = [yaml.safe_load(value) for value in values.split(",")]
    return grid or None


def _tune(tasks: str, grid: list[str] | None, only: list[str], output: str, device: str, **options: Any) -> None:
    from mats_hub.choosing import tune

    choice = tune(read_recipe(options), tasks, grid=_grid(grid), only=only, device=device, progress=progress_bar)
    print(f"{choice}\n\nbest on validation data: {choice.best.label}, written to {choice.save(output)}")


def _compare(tasks: str, methods: str, tune: bool, part: str, output: str, device: str, **options: Any) -> None:
    from mats_hub.choosing import compare

    names = () if methods == "all" else methods.split(",")
    choice = compare(
        read_recipe(options), tasks, methods=names, tuned=tune, part=part, device=device, progress=progress_bar
    )
    print(f"{choice}\n\nbest on {part} data: {choice.best.label}, written to {choice.save(output)}")
