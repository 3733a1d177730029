"""Commands that measure, show and publish an expert's statistics."""

from __future__ import annotations

from typing import Any

from mats_hub.progress import progress_bar

DATA_OPTIONS: dict[str, str] = {
    "dataset": "Hub id 'owner/name[@revision]', a JSONL, CSV or Parquet file, or a folder of them or of images by class; a "
    "causal language model can do without, and is measured on text that it generates itself",
    "config": "the data set's configuration",
    "split": "the data set's split",
    "label": "label column; inferred from usual names otherwise",
    "image": "image column",
    "target": "column of what a text becomes, or of what is said to it",
    "audio": "column of sounds",
    "messages": "column of conversations, put through the chat template; only the assistant's tokens count",
    "labels": "data (empirical Fisher) or model (true Fisher: drawn from its predictions)",
    "task": "the kind of task, when the model's class does not tell",
}


def add_commands(commands: Any) -> None:
    """Add the commands `statistics`, `statistics-info` and `statistics-push`."""
    statistics = commands.add_parser("statistics", help="measure an expert's statistics on its task's data")
    statistics.add_argument("model", help="Hub id 'owner/name[/folder][@revision]' or a folder")
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
    statistics.add_argument(
        "--choices", action="append", default=[],
        help="column of the answers to choose from, or given once for each; --label tells the right one",
    )  # fmt: skip
    for name, text in DATA_OPTIONS.items():
        default = {"default": "data"} if name == "labels" else {}
        statistics.add_argument(f"--{name}", help=text, **default)
    statistics.add_argument(
        "--base", help="an adapter's base, when it is not the one it names; or the model that it is a part of"
    )
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
    _add_commands_of_files(commands)


def _add_commands_of_files(commands: Any) -> None:
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


def _statistics(model: str, output: str | None, kind: list[str] | None, push: str | None, **options: Any) -> None:
    from mats_hub.hub_id import short_name
    from mats_hub.statistics import compute_statistics

    target = output or f"{short_name(model)}.statistics.safetensors"
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
