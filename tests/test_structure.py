"""The house: imports only go down, the public names are what is documented, the template travels with the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mats_hub
from mats_hub.methods import METHODS

ROOT = Path(mats_hub.__file__).parents[1]
PACKAGE = ROOT / "mats_hub"

FLOORS = (
    ("errors", "hub_id", "initialization_options", "methods"),
    ("schema_errors",),
    ("mergekit_config",),
    (
        "hf_extension",
        "recipe",
        "curvature",
        "delta",
        "device",
        "hub_client",
        "initialization",
        "localize",
        "processes",
        "tensor_header",
        "progress",
        "statistics.sketch",
        "threads",
    ),
    ("linear_system", "source", "architecture", "report"),
    ("closed_form", "streaming", "figures"),
    ("preconditioner",),
    ("solver", "statistics.conditioning"),
    ("checkpoint", "pickles", "companions"),
    ("adapter", "bundle", "journal", "statistics.accumulate", "statistics.dataset"),
    ("lora", "output", "statistics.watch", "statistics.storage", "statistics.parallel"),
    ("adapter_opening", "statistics.file"),
    ("statistics.remote",),
    ("statistics.collect", "statistics.multiple_choice"),
    ("expert", "statistics.task_data", "statistics.passes"),
    ("statistics.encoding",),
    ("statistics.tasks",),
    ("loading",),
    ("statistics.measure",),
    ("statistics",),
    ("plan",),
    ("coverage", "adapter_planning", "matching"),
    ("base", "companion_choice", "reading"),
    ("method_checks", "vocabulary"),
    ("thresholds",),
    ("planning", "merging", "scoring"),
    ("evaluation",),
    ("suite",),
    ("adapter_merging", "card", "eval_results"),
    ("hub", "merged_model"),
    ("demo", "browsing", "candidates", "conflict", "jobs", "replaying"),
    ("choosing", "compressing"),
    ("cli.recipes", "cli.statistics"),
    ("cli.browsing", "cli.choosing"),
    ("cli.compression",),
    ("cli",),
    ("__main__",),
)
"""Modules by floor: one may import those of lower floors, and its own floor's only when they are named in ASIDE."""

ASIDE = {("hub", "merged_model"), ("merged_model", "hub")}
ARRAYS_ONLY = (
    *("curvature", "delta", "localize", "linear_system", "closed_form", "preconditioner", "solver", "initialization"),
)


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    return "initialization" if name.startswith("initialization.") else name


def imports() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found.setdefault(module_name(path), set()).update(names)
    return found


def test_imports_only_go_down():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    seen = imports()
    assert set(seen) == set(floor), "every module has a floor"
    for module, names in seen.items():
        for name in names:
            if not name.startswith("mats_hub."):
                continue
            target = name.removeprefix("mats_hub.")
            target = "initialization" if target.startswith("initialization.") else target
            inside = target == module or (module == "initialization" and target == "initialization")
            assert inside or (module, target) in ASIDE or floor[target] < floor[module], f"{module} imports {target}"


def test_the_mathematics_imports_arrays_alone():
    allowed = {
        "torch",
        "numpy",
        "mats_hub",
        "collections",
        "dataclasses",
        "functools",
        "math",
        "itertools",
        "operator",
        "abc",
        "enum",
        "hashlib",
        "typing",
    }
    for module, names in imports().items():
        if module in ARRAYS_ONLY:
            outside = {name.split(".")[0] for name in names} - allowed - {"__future__"}
            assert not outside, f"{module} imports {outside}"


def test_the_public_names_are_there_and_documented():
    assert mats_hub.__all__ == sorted(mats_hub.__all__)
    for name in mats_hub.__all__:
        value = getattr(mats_hub, name)
        assert name in ("__version__", "METHODS") or value.__doc__
    readme = (ROOT / "README.md").read_text()
    for name in METHODS:
        assert f"`{name}`" in readme, f"README does not list method {name}"


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."]])
def test_the_linter_agrees_docstrings_included(command):
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_the_type_checker_agrees():
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
