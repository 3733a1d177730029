"""Commands that find what others merged, and make it again."""

from __future__ import annotations

from typing import Any

from mats_hub.cli.recipes import STREAM, check_can_push, option_name
from mats_hub.progress import progress_bar


def add_commands(commands: Any) -> None:
    """Add the commands `browse`, `show` and `replay`."""
    browse = commands.add_parser("browse", help="list merges on the Hub that carry a recipe")
    browse.add_argument("query", nargs="?", help="words in the id")
    browse.add_argument("--author", help="user or organization")
    browse.add_argument("--base", metavar="OWNER/NAME", help="a model they are made from, the base or an expert")
    browse.add_argument("--limit", type=int, default=20, help="at most so many (default: %(default)s)")
    browse.set_defaults(run=_browse)
    show = commands.add_parser("show", help="print a model's card, and what it was made from as a tree")
    show.add_argument("model", help="Hub id 'owner/name[/folder][@revision]' or a folder")
    show.add_argument("--lineage", action="store_true", help="the tree alone")
    show.set_defaults(run=_show)
    replay = commands.add_parser("replay", help="make a published merge again from its recipe, and compare")
    replay.add_argument("model", help="the merge: Hub id 'owner/name[/folder][@revision]' or a folder")
    replay.add_argument("--check", action="store_true", help="compare only; exit status 1 when a tensor differs")
    replay.add_argument("--change", action="append", metavar="NAME=VALUE", help="make a variant with another option")
    replay.add_argument("--output", help="folder to write; it must not exist or be empty")
    replay.add_argument("--push", metavar="OWNER/NAME", help="publish the result there")
    replay.add_argument("--private", action="store_true", help="make the published repository private")
    replay.add_argument("--stream", action="store_true", help=STREAM)
    replay.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    replay.set_defaults(run=_replay)


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
    model: str,
    check: bool,
    change: list[str] | None,
    output: str | None,
    push: str | None,
    private: bool,
    device: str,
    stream: bool,
) -> int:
    import yaml

    from mats_hub.errors import RecipeError
    from mats_hub.replaying import replay

    if check and (change or push or output):
        raise RecipeError("--check only compares; leave out --change, --output and --push, or leave out --check")
    if not (check or output or push):
        raise RecipeError("say what the result is for: --check, --output FOLDER or --push OWNER/NAME")
    if push:
        check_can_push(push)
    changes = {}
    for pair in change or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--change {pair!r}: write NAME=VALUE, such as --change scale=0.4")
        changes[option_name(name)] = yaml.safe_load(value)
    made = replay(model, output=output, changes=changes or None, device=device, stream=stream, progress=progress_bar)
    if not changes:
        print(made)
    if output:
        print(f"written: {output}")
    if push:
        print(made.merged.push_to_hub(push, private=private))
    return 1 if check and not made.identical else 0
