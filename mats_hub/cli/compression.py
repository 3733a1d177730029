"""Commands that compress experts into one repository, and give one back."""

from __future__ import annotations

from typing import Any

from mats_hub.cli.choosing import TASKS
from mats_hub.cli.recipes import add_recipe_flags, check_can_push, read_recipe
from mats_hub.progress import progress_bar


def add_commands(commands: Any) -> None:
    """Add the commands `compress` and `extract`."""
    compress = commands.add_parser("compress", help="write experts as one multi-task vector and a mask for each task")
    add_recipe_flags(compress)
    compress.add_argument("--output", required=True, help="folder to write; it must not exist or be empty")
    compress.add_argument("--ties", action="store_true", help="the multi-task vector of TIES, not the plain sum")
    compress.add_argument("--tasks", help=f"choose each mask on validation data: {TASKS}")
    compress.add_argument("--push", metavar="OWNER/NAME", help="publish the result there")
    compress.add_argument("--private", action="store_true", help="make the published repository private")
    compress.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    compress.set_defaults(run=_compress)

    extract = commands.add_parser("extract", help="write one of several compressed experts as an ordinary checkpoint")
    extract.add_argument("model", help="the compressed experts: Hub id 'owner/name[/folder][@revision]' or a folder")
    extract.add_argument("--task", required=True, help="whose expert")
    extract.add_argument("--output", required=True, help="folder to write; it must not exist or be empty")
    extract.add_argument("--base", help="the base, when it is not the one that is named")
    extract.set_defaults(run=_extract)


def _compress(
    output: str, ties: bool, tasks: str | None, push: str | None, private: bool, device: str, **options: Any
) -> None:
    from mats_hub.compressing import DEFAULT_SCALE, compress
    from mats_hub.plan import human_bytes

    if push:
        check_can_push(push)
    scales = options.pop("mask_scale") or [str(DEFAULT_SCALE)]
    recipe = read_recipe(options)
    values = dict(enumerate(scales))
    scale = {e.task: float(values.get(i, scales[0])) for i, e in enumerate(recipe.experts)}
    made = compress(
        recipe,
        output=output,
        vector="ties" if ties else "task_arithmetic",
        mask_scale=scale,
        tasks=tasks,
        device=device,
        progress=progress_bar,
    )
    facts = made.report.bundle
    assert facts
    for name, task in facts["tasks"].items():
        print(f"{name}: λ {task['mask_scale']:g}, mask {human_bytes(task['bytes'])}")
    print(
        f"{human_bytes(facts['bytes'])} in {output}; the experts as they are: {human_bytes(facts['expert_bytes'])}, as full "
        f"checkpoints: {human_bytes(facts['full_bytes'])}"
    )
    if push:
        print(made.push_to_hub(push, private=private))


def _extract(model: str, task: str, output: str, base: str | None) -> None:
    from mats_hub.compressing import extract

    extract(model, task, output=output, base=base)
    print(f"written: {output}")
