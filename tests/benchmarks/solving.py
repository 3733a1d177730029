"""Conjugate gradient beside the solver of the MaTS authors, on identical systems, in one run.

    git clone https://github.com/r-three/mats
    python tests/benchmarks/solving.py --theirs mats/src/merging/conjugateGradient_fisherMerging.py [--device cuda]

Their two functions (SciPy's conjugate gradient, one weight at a time) are taken from that file, without what else it imports.
Systems are K-FAC of three experts, with Grams whose eigenvalues fall off as those of trained models do. Printed for each shape:
the seconds of one step of theirs ÷ ours, and the seconds until the residual that theirs has in the end, theirs ÷ ours (with the
Kronecker preconditioner). On a GPU also the share of its measured matrix-product throughput that ours reaches.

With --rank 64 instead of --theirs: steps with Grams that are sketched to this rank, beside those with the same Grams written out.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from mats_hub.curvature import Kronecker, LowRank
from mats_hub.linear_system import LinearSystem, match, together
from mats_hub.preconditioner import kronecker_preconditioner
from mats_hub.solver import conjugate_gradient, conjugate_gradients
from mats_hub.statistics.sketch import Sketch, nystrom

LAYERS = {
    "small": {(384, 384): 4, (1536, 384): 1, (384, 1536): 1},
    "base": {(768, 768): 4, (3072, 768): 1, (768, 3072): 1},
    "large": {(4096, 4096): 1, (1024, 4096): 1},
}
EXPERTS, STEPS, RUNS = 3, 100, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--theirs", type=Path)
    what.add_argument("--rank", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["small"])
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    shapes = {shape: count for layers in arguments.layers for shape, count in LAYERS[layers].items()}
    if arguments.rank:
        return compare_sketches(shapes, arguments)
    theirs = Theirs(arguments.theirs, arguments.device)
    peak = matrix_products(arguments.device)
    if arguments.device != "cpu":
        print(f"{torch.cuda.get_device_name()}: float32 matrix products at {peak / 1e12:.1f} TFLOP/s")
    print(
        "| weights | residual of both after | step, theirs ÷ ours | to that residual, theirs ÷ ours | steps | of the peak |"
    )
    print("|---|---|---|---|---|---|")
    for shape, count in shapes.items():
        systems = [system(shape, seed, arguments.device) for seed in range(count)]
        starts = [torch.stack(s.deltas).mean(0) for s in systems]
        row = compare(theirs, systems, starts, arguments.device, arguments.runs)
        flops = 2 * EXPERTS * STEPS * count * (shape[0] ** 2 * shape[1] + shape[0] * shape[1] ** 2)
        share = f"{flops / row['ours'] / peak:.0%}"
        print(
            f"| {count} of {shape[0]} × {shape[1]} | {row['residual']:.1e}, {row['residual ours']:.1e} "
            f"| {row['theirs'] / row['steps'] / (row['ours'] / STEPS):.1f} | {row['theirs'] / row['reached']:.1f} "
            f"| {row['steps']:.0f}, {row['steps ours']:.0f} | {share} |",
            flush=True,
        )
        if arguments.device != "cpu":
            print(
                f"  seconds: theirs {row['theirs']:.3f}, ours {row['ours']:.4f}, to the residual {row['reached']:.4f}"
            )


def compare_sketches(shapes: Iterable[tuple[int, int]], arguments: argparse.Namespace) -> None:
    """Print the medians of what steps take with matrices ÷ with the sketches that they were written out from."""
    print(f"| weight | step, matrices ÷ sketches of rank {arguments.rank} | preconditioned |\n|---|---|---|")
    for shape in shapes:
        whole = system(shape, 0, arguments.device)
        sketched = match([sketch(c, arguments.rank) for c in whole.curvatures], whole.deltas, [1.0] * EXPERTS)
        written = match([c.dense() for c in sketched.curvatures], whole.deltas, [1.0] * EXPERTS)
        start, ratios = torch.stack(whole.deltas).mean(0), []
        for preconditioned in (False, True):
            spent: list[list[float]] = [[], []]
            for _ in range(arguments.runs + 1):
                for one, held in zip((written, sketched), spent, strict=True):
                    apply = kronecker_preconditioner(one) if preconditioned else None
                    solve = partial(conjugate_gradient, one, start, iterations=STEPS // 10, preconditioner=apply)
                    held.append(timed(solve, arguments.device)[1])
            ratios.append(np.median(spent[0][1:]) / np.median(spent[1][1:]))  # the first run warms up
        print(f"| {shape[0]} × {shape[1]} | {ratios[0]:.1f} | {ratios[1]:.1f} |", flush=True)


def sketch(curvature: Kronecker, rank: int) -> Kronecker:
    sides = []
    for gram in (curvature.output, curvature.input):
        probes = Sketch(rank).probes(["gram"], len(gram)).to(gram.device)
        sides.append(LowRank(*nystrom(gram @ probes, probes, gram.diagonal())).to(gram.device, gram.dtype))
    return Kronecker(*sides)


def compare(
    theirs: Theirs, systems: list[LinearSystem], starts: list[Tensor], device: str, runs: int
) -> dict[str, float]:
    """Return the medians of alternating runs, over all the systems."""
    found: dict[str, list[float]] = {"theirs": [], "ours": [], "reached": []}
    joint, start = together(systems), torch.stack(starts)
    at_once = device != "cpu" and start.numel() <= 2**23

    def ours(**options: Any) -> list[Any]:
        solved = []
        if at_once:
            assert joint is not None
            precondition = kronecker_preconditioner(joint) if options.pop("precondition", False) else None
            return conjugate_gradients(joint, start, preconditioner=precondition, **options)
        preconditioned = options.pop("precondition", False)
        for one, x0 in zip(systems, starts, strict=True):
            precondition = kronecker_preconditioner(one) if preconditioned else None
            solved.append(conjugate_gradient(one, x0, preconditioner=precondition, **options))
        return solved

    for run in range(runs + 1):
        values, spent = timed(lambda: theirs.solve(systems, starts), device)
        ended = [residual(one, value) for one, value in zip(systems, values, strict=True)]
        plain, own = timed(lambda: ours(iterations=STEPS), device)
        until, reached = timed(
            lambda: ours(iterations=STEPS, tolerance=max(ended), precondition=True),  # noqa: B023
            device,
        )
        if run:  # the first one warms up
            for name, value in (("theirs", spent), ("ours", own), ("reached", reached)):
                found[name].append(value)
    assert all(s.residual <= max(ended) * 1.01 for s in until)
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return medians | {
        "residual": max(ended),
        "residual ours": max(s.residual for s in plain),
        "steps": theirs.products / len(systems),
        "steps ours": max(s.iterations for s in until),
    }


class Theirs:
    """The authors' function for K-FAC, from a copy of their file."""

    def __init__(self, path: Path, device: str) -> None:
        tree = ast.parse(path.read_text())
        wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "cg_forwardBackward"]
        names: dict[str, Any] = {"torch": torch, "np": np, "cg": cg, "LinearOperator": LinearOperator}
        names |= {"tqdm": lambda items: items, "from_numpy": self._from_numpy, "tensor": torch.tensor}
        exec(compile(ast.Module(wanted, []), str(path), "exec"), names)
        self._function = names["cg_forwardBackward"]
        self.products = 0
        if device == "cpu":  # they ask for a GPU in so many words
            torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    def _from_numpy(self, array: np.ndarray) -> Tensor:
        self.products += 1
        return torch.from_numpy(array)

    def solve(self, systems: list[LinearSystem], starts: list[Tensor]) -> list[Tensor]:
        """Return their solutions; the systems are handed over as their code wants them, transposed and on the CPU."""
        names = [f"m{number}" for number in range(len(systems))]
        inputs: list[dict[str, Tensor]] = []
        outputs: list[dict[str, Tensor]] = []
        for expert in range(EXPERTS):
            inputs.append(
                {f"{n}.weight": s.curvatures[expert].input.cpu() for n, s in zip(names, systems, strict=True)}
            )
            outputs.append(
                {f"{n}.weight": s.curvatures[expert].output.cpu() for n, s in zip(names, systems, strict=True)}
            )
        rhs = {f"{n}.weight": s.rhs.T.contiguous().cpu() for n, s in zip(names, systems, strict=True)}
        init = {f"{n}.weight": x0.T.contiguous().cpu() for n, x0 in zip(names, starts, strict=True)}
        self.products = 0
        model, _ = self._function(inputs, outputs, rhs, init, STEPS, names)
        self.products -= 3 * len(systems)  # the first residual, and two errors that are logged
        return [model[f"{n}.weight"].to(starts[0]) for n in names]


def system(shape: tuple[int, int], seed: int, device: str) -> LinearSystem:
    """Return a K-FAC system of three experts, its eigenvalues falling off by a power law."""
    torch.manual_seed(seed)
    out, inner = shape
    curvatures = [Kronecker(gram(out, device), gram(inner, device)) for _ in range(EXPERTS)]
    deltas = [torch.randn(shape, device=device) * 0.01 for _ in range(EXPERTS)]
    return match(curvatures, deltas, [1.0] * EXPERTS)


def gram(size: int, device: str) -> Tensor:
    rows = torch.randn(size, size, device=device) / size**0.5
    rows = rows * torch.arange(1, size + 1, device=device) ** -0.5
    mixed = rows @ (torch.randn(size, size, device=device) / size**0.5)
    return mixed.T @ mixed


def residual(one: LinearSystem, x: Tensor) -> float:
    return float(one.residual(x).norm() / one.rhs.norm())


def timed(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    value = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return value, time.perf_counter() - started


def matrix_products(device: str) -> float:
    """Return the float32 FLOP/s of large square matrix products on this device."""
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    best = min(timed(lambda: a @ a, device)[1] for _ in range(6))
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
