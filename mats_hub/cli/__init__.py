"""The command line: parse, make one public call, print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mats_hub import __version__
from mats_hub.cli import browsing, choosing, compression, recipes, statistics
from mats_hub.errors import MatsError
from mats_hub.hf_extension import program_name
from mats_hub.methods import METHODS
from mats_hub.progress import progress_bar


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
        print(f"mats-hub: {type(error).__name__}: {error}{_notes(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"mats-hub: stopped; nothing was left half-written{_notes(error)}", file=sys.stderr)
        return 130


def _notes(error: BaseException) -> str:
    return "".join(f". {note}" for note in getattr(error, "__notes__", ()))


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

    for module in (statistics, recipes, choosing, compression, browsing):
        module.add_commands(commands)
    convert = commands.add_parser(
        "convert",
        help="make safetensors of a model that has pickles only (pytorch_model.bin), running no code of theirs",
    )
    convert.add_argument("model", help="Hub id 'owner/name[/folder][@revision]' or a folder")
    convert.set_defaults(run=_convert)
    page = commands.add_parser("ui", help="open the page in which all this is done by clicking, on this machine")
    page.add_argument("--port", type=int, help="where to serve it; the first free one from 7860 on otherwise")
    page.set_defaults(run=_ui)
    register = commands.add_parser("register-cli", help="make 'hf mats' run this program, offline")
    register.set_defaults(run=_register)
    return parser


def _demo(output: str, device: str) -> None:
    from mats_hub.demo import run_demo

    run_demo(output, device, progress_bar, print)


def _convert(model: str) -> None:
    from mats_hub.pickles import convert

    print(f"{model} is read from its safetensors in {convert(model)} now")


def _ui(port: int | None) -> None:
    from mats_hub.errors import OutputError

    here = Path(__file__).parents[1]
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
