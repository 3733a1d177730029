"""Numbers that the public reference implementations give for tiny inputs (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mats_hub
from mats_hub.curvature import Curvature, Dense, Diagonal, Gram, Kronecker
from mats_hub.initialization import INITIALIZATIONS, Context
from mats_hub.initialization.consensus import multi_task_vector, task_mask
from mats_hub.initialization.dare import rescaled
from mats_hub.initialization.ties import elect
from mats_hub.linear_system import match
from mats_hub.recipe import Curvature as CurvatureOptions
from mats_hub.solver import conjugate_gradient, exact
from mats_hub.statistics import Provenance, Statistics, Sums
from mats_hub.statistics.conditioning import conditioned_gram
from mats_hub.thresholds import MagnitudeRank

GOLDEN = Path(__file__).parent / "golden"
INPUTS = load_file(GOLDEN / "inputs.safetensors")
SIMPLE = load_file(GOLDEN / "simple.safetensors")
CG = load_file(GOLDEN / "mats_cg.safetensors")
TIES = load_file(GOLDEN / "ties.safetensors")
DARE = load_file(GOLDEN / "dare.safetensors")
DATA_FREE = load_file(GOLDEN / "datafree.safetensors")
TALL = load_file(GOLDEN / "tall.safetensors")
RUNS = {
    (run["kind"], run["init"], run["maxiter"], run["precision"], run["tensor"]): run
    for run in json.loads((GOLDEN / "runs.json").read_text())["cg_runs"]
}
TASKS = ("task0", "task1", "task2")
PARAMETERS = ("enc.fc1.bias", "enc.fc1.weight", "enc.fc2.weight", "enc.norm.weight")
LINEAR = ("enc.fc1", "enc.fc2")
DTYPES = {"f32": torch.float32, "f64": torch.float64}
CLOSED_FORM = {"f32": 2e-6, "f64": 1e-12}
CONJUGATE_GRADIENT = {"f32": {5: 2e-6, 10: 5e-4, 50: 5e-4}, "f64": {5: 1e-9, 10: 1e-9, 50: 1e-5}}
"""Relative Frobenius errors; in float64 tight enough that float32 arithmetic anywhere would be seen."""


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert float((ours.double() - theirs.double()).norm()) <= tolerance * float(theirs.double().norm())


def experts(parameter: str, precision: str) -> list[Tensor]:
    prefix = "ia3/" if "ia3" in parameter else ""
    return [INPUTS[f"{prefix}{task}/{parameter}"].to(DTYPES[precision]) for task in TASKS]


def base(parameter: str, precision: str) -> Tensor:
    prefix = "ia3/" if "ia3" in parameter else ""
    return INPUTS[f"{prefix}pretrained/{parameter}"].to(DTYPES[precision])


def curvatures(kind: str, parameter: str, precision: str) -> list[Curvature]:
    """Return each task's curvature through the statistics file's own path, or directly for (IA)³ blocks."""
    if kind == "ia3_block":
        return [Dense(INPUTS[f"ia3_fisher_block/{task}/{parameter}"].to(DTYPES[precision])) for task in TASKS]
    off_diagonal = float(kind.removeprefix("gram_scale")) if kind.startswith("gram_scale") else 1.0
    options = CurvatureOptions(kind="kfac" if kind == "kfac" else "gram", off_diagonal=off_diagonal)
    module = parameter.removesuffix(".weight")
    found = []
    for task in TASKS:
        tensors = {
            f"{module}.input_gram": INPUTS[f"gram_in/{task}/{module}"],
            f"{module}.output_gram": INPUTS[f"gram_out/{task}/{module}"],
        }
        statistics = Statistics(Provenance(("kfac",)), Sums(tensors, {module: 1}))
        found.append(statistics.curvature(parameter, options, dtype=DTYPES[precision]))
    return found


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_average_and_task_arithmetic(parameter, precision):
    origin = base(parameter, precision)
    deltas = [weight - origin for weight in experts(parameter, precision)]
    average = origin + INITIALIZATIONS["average"](deltas, [1.0] * 3, Context())
    arithmetic = origin + INITIALIZATIONS["task_arithmetic"](deltas, [1.0] * 3, Context(), scale=0.3)
    close(average, SIMPLE[f"average/{precision}/{parameter}"], CLOSED_FORM[precision])
    close(arithmetic, SIMPLE[f"task_arithmetic_0.3/{precision}/{parameter}"], CLOSED_FORM[precision])
    # What RegMean and MaTS have no Gram for, they average.
    unmatched = [
        tensors[key]
        for tensors in (SIMPLE, CG)
        for key in tensors
        if not parameter.removesuffix(".weight").endswith(("fc1", "fc2"))
        and key.startswith(("regmean", "gram", "kfac"))
        and key.endswith(f"{precision}/{parameter}")
    ]
    assert bool(unmatched) == (parameter in ("enc.fc1.bias", "enc.norm.weight"))
    for theirs in unmatched:
        close(average, theirs, CLOSED_FORM[precision])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("module", LINEAR)
@pytest.mark.parametrize("scale", ["0.0", "0.9", "1.0"])
def test_regmean(scale, module, precision):
    parameter = f"{module}.weight"
    weights = experts(parameter, precision)
    origin = sum(weights) / 3
    system = match(curvatures(f"gram_scale{scale}", parameter, precision), [w - origin for w in weights], [1.0] * 3)
    ours = origin + exact(system, torch.zeros_like(origin)).value
    close(ours, SIMPLE[f"regmean_{scale}/{precision}/{parameter}"], CLOSED_FORM[precision])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize(
    ("name", "tasks", "weights"),
    [
        ("fisher_diag", (0, 1, 2), (1.0, 1.0, 1.0)),
        ("fisher_diag_two_models_0.3", (0, 1), (0.3, 0.7)),
        ("fisher_diag_two_models_1.0", (0, 1), (1.0, 0.0)),
    ],
)
def test_fisher(name, tasks, weights, parameter, precision):
    own = [experts(parameter, precision)[task] for task in tasks]
    origin = sum(own) / len(own)
    fishers = [Diagonal(INPUTS[f"fisher_diag/task{task}/{parameter}"].to(origin).clamp(min=1e-8)) for task in tasks]
    ours = origin + exact(match(fishers, [w - origin for w in own], weights), torch.zeros_like(origin)).value
    close(ours, SIMPLE[f"{name}/{precision}/{parameter}"], CLOSED_FORM[precision])


STARTS = {
    "average": lambda parameter, precision: sum(experts(parameter, precision)) / 3,
    "zero": lambda parameter, precision: torch.zeros_like(base(parameter, precision)),
    "task_arithmetic": lambda parameter, precision: (
        base(parameter, precision)
        + (0.2 if "ia3" in parameter else 0.3)
        * sum(weight - base(parameter, precision) for weight in experts(parameter, precision))
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=["-".join(map(str, key)) for key in RUNS])
def test_conjugate_gradient(run):
    """Solve in weight coordinates with the reference's stop rule: same iterates, same number of steps."""
    kind, start, steps, precision, parameter = (run[k] for k in ("kind", "init", "maxiter", "precision", "tensor"))
    system = match(curvatures(kind, parameter, precision), experts(parameter, precision), [1.0] * 3)
    solution = conjugate_gradient(system, STARTS[start](parameter, precision), iterations=steps, tolerance=1e-5)
    close(solution.value, CG[f"{kind}/{start}/{steps}/{precision}/{parameter}"], CONJUGATE_GRADIENT[precision][steps])
    assert abs(solution.iterations - run["iterations"]) <= (0 if precision == "f64" else 1)


@pytest.mark.parametrize(
    ("kind", "parameter"),
    [
        *((kind, f"{module}.weight") for kind in ("gram", "gram_scale0.9", "kfac") for module in LINEAR),
        *(("ia3_block", f"enc.ia3_{name}") for name in "kl"),
    ],
)
def test_task_vectors_solved_to_the_end_are_the_exact_solution(kind, parameter):
    origin = base(parameter, "f64")
    system = match(curvatures(kind, parameter, "f64"), [w - origin for w in experts(parameter, "f64")], [1.0] * 3)
    start = torch.zeros_like(origin)
    theirs = CG[f"{kind}/exact/f64/{parameter}"]
    close(origin + conjugate_gradient(system, start, iterations=200).value, theirs, 1e-9)
    if kind != "kfac":
        close(origin + exact(system, start).value, theirs, 1e-9)


def ties_of(vectors: Tensor, density: float, scale: float = 1.0) -> Tensor:
    context = Context(thresholds=tuple(threshold(vector, density) for vector in vectors))
    return INITIALIZATIONS["ties"](list(vectors), [1.0] * len(vectors), context, density=density, scale=scale)


def threshold(vector: Tensor, density: float) -> float:
    """Return the global trimming threshold as a merge finds it, part by part."""
    rank = MagnitudeRank(density)
    while rank.value is None:
        for part in vector.split(7):
            rank.add(part)
        rank.narrow()
    return rank.value


@pytest.mark.parametrize("percent", [20, 50])
def test_ties(percent):
    vectors = TIES["random/task_vectors"]
    masks = torch.stack([vector.abs() >= threshold(vector, percent / 100) for vector in vectors])
    assert torch.equal(masks, TIES[f"random/K{percent}/trim_mask"])
    ours = ties_of(vectors, percent / 100)
    close(ours, TIES[f"random/K{percent}/dis-mean/merged_tv"], CLOSED_FORM["f32"])
    assert torch.equal(ours != 0, TIES[f"random/K{percent}/dis-mean/merged_tv"] != 0)
    for scale in (1.0, 0.4):
        merged = ties_of(vectors, percent / 100, scale)
        start = 0
        for parameter in sorted(PARAMETERS):
            origin = base(parameter, "f32")
            part = merged[start : start + origin.numel()].reshape(origin.shape)
            close(origin + part, TIES[f"random/K{percent}/dis-mean/lambda{scale}/{parameter}"], CLOSED_FORM["f32"])
            start += origin.numel()


@pytest.mark.parametrize("turned", [1, -1])
@pytest.mark.parametrize("percent", [20, 50, 90])
def test_ties_with_equal_magnitudes_and_cancelling_signs(percent, turned):
    """Where signs cancel exactly the reference elects the majority of the rest of the vector; we elect + always."""
    vectors = turned * TIES["edge/task_vectors"]
    masks = torch.stack([v.abs() >= threshold(v, percent / 100) for v in vectors])
    assert torch.equal(masks, TIES[f"edge/K{percent}/trim_mask"].bool())
    trimmed = torch.where(masks, vectors, 0)
    cancelled = trimmed.sum(0) == 0
    assert 0 < cancelled.sum() < len(cancelled)
    ours, theirs = ties_of(vectors, percent / 100), turned * TIES[f"edge/K{percent}/dis-mean/merged_tv"]
    signs = TIES[f"edge/K{percent}/{'signs' if turned == 1 else 'signs_neg_majority'}"]
    assert torch.equal(ours[~cancelled], theirs[~cancelled])
    assert torch.equal(ours[~cancelled].sign(), signs[~cancelled].to(ours))
    kept = trimmed.clamp(min=0)
    positive = kept.sum(0) / (kept > 0).sum(0).clamp(min=1)
    assert torch.equal(ours[cancelled], positive[cancelled])


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_dare_drops_and_divides_by_the_density(parameter):
    origin = base(parameter, "f32")
    dropped = [
        rescaled(weight - origin, DARE[f"mask/{task}/{parameter}"].bool(), 0.5)
        for task, weight in zip(TASKS, experts(parameter, "f32"), strict=True)
    ]
    for task, ours in zip(TASKS, dropped, strict=True):
        close(ours, DARE[f"peft_delta/{task}/{parameter}"], CLOSED_FORM["f32"])
    close(origin + 0.3 * sum(dropped), DARE[f"dare_linear_w0.3/peft/{parameter}"], CLOSED_FORM["f32"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("module", LINEAR)
def test_grams_count_unmasked_tokens_alone(task, module):
    mask = INPUTS[f"mask/{task}"].bool()
    sums = Sums()
    sums.add_rows("in", INPUTS[f"activations/{task}/{module}"][mask])
    sums.add_rows("out", INPUTS[f"output_grads/{task}/{module}"][mask])
    count = int(mask.sum())
    close(sums.tensors["in"] / count, INPUTS[f"gram_in/{task}/{module}"], CLOSED_FORM["f32"])
    close(sums.tensors["out"] / count, INPUTS[f"gram_out/{task}/{module}"], CLOSED_FORM["f32"])
    assert isinstance(curvatures("kfac", f"{module}.weight", "f32")[0], Kronecker)
    assert isinstance(curvatures("gram", f"{module}.weight", "f32")[0], Gram)


def data_free_deltas(parameter: str) -> list[Tensor]:
    """Return the task vectors as the data-free references were given them: differences in float32, then float64."""
    return [(weight - base(parameter, "f32")).double() for weight in experts(parameter, "f32")]


@pytest.mark.parametrize("module", LINEAR)
def test_grams_of_task_vectors_are_those_of_wudi(module):
    """WUDI divides a Gram by ‖τ‖², its trace; we by its mean diagonal, so that ours are `in` times as large."""
    parameter = f"{module}.weight"
    deltas, options = data_free_deltas(parameter), CurvatureOptions(kind="task_vector", normalization="trace")
    system = match([conditioned_gram(delta.T @ delta, options) for delta in deltas], deltas, [1.0] * 3)
    assert isinstance(system.operator, Gram)
    close(system.operator.matrix, deltas[0].shape[1] * DATA_FREE[f"wudi/gram_sum/f64/{parameter}"], 1e-12)
    theirs = DATA_FREE[f"wudi/exact_from_sum/f64/{parameter}"]
    close(exact(system, sum(deltas)).value, theirs, 1e-12)
    close(conjugate_gradient(system, sum(deltas), iterations=200).value, theirs, 1e-8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write the golden models as checkpoints in float64: a base, and what the data-free references' deltas make of it."""
    root = tmp_path_factory.mktemp("golden")
    moves = {"pretrained": {p: torch.zeros_like(base(p, "f64")) for p in PARAMETERS}}
    moves |= {task: {p: data_free_deltas(p)[number] for p in PARAMETERS} for number, task in enumerate(TASKS)}
    for model, move in moves.items():
        (root / model).mkdir()
        tensors = {p: base(p, "f64") + move[p] for p in PARAMETERS}
        save_file(tensors, root / model / "model.safetensors", metadata={"format": "pt"})
    return root


def test_wudi_as_a_merge(folders):
    merged = mats_hub.merge(
        [str(folders / task) for task in TASKS], base=str(folders / "pretrained"), device="cpu", method="mats",
        curvature="task_vector", normalization="trace", initialization="task_arithmetic", scale=1.0, solver="exact",
    )  # fmt: skip
    written = load_file(merged.folder / "model.safetensors")
    for parameter in PARAMETERS:
        theirs = DATA_FREE.get(f"wudi/exact_from_sum/f64/{parameter}", sum(data_free_deltas(parameter)))
        close(written[parameter] - base(parameter, "f64"), theirs, 1e-12)
    assert {record.key for record in merged.report.solved} == {f"{module}.weight" for module in LINEAR}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize(("method", "options"), [("iso_c", {}), ("iso_cts", {"common": 0.4}), ("tsvm", {})])
def test_spectral_methods(method, options, parameter, precision):
    name = method + (f"_{options['common']}" if options else "")
    deltas = [(weight - base(parameter, "f32")).to(DTYPES[precision]) for weight in experts(parameter, "f32")]
    theirs = DATA_FREE[f"{name}/{precision}/{parameter}"]
    close(
        INITIALIZATIONS[method](deltas, [1.0] * 3, Context(), **options), theirs, {"f32": 2e-5, "f64": 1e-11}[precision]
    )


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_dare_ties_elects_after_dropping(parameter):
    """The reference's deltas without a rescaling are ours times the density."""
    kept = [
        torch.where(DARE[f"mask/{task}/{parameter}"].bool(), weight - base(parameter, "f32"), 0)
        for task, weight in zip(TASKS, experts(parameter, "f32"), strict=True)
    ]
    ours = base(parameter, "f32") + 0.3 * elect(kept, [1.0] * 3, "sum")
    close(ours, DARE[f"dare_ties_w0.3_unnormalized/mergekit_none/{parameter}"], CLOSED_FORM["f32"])


VECTORS = {"task_arithmetic": {"vector": "task_arithmetic"}, "ties_k20_sum": {"vector": "ties", "density": 0.2}}
SELECTED = {
    "task_arithmetic": ("task_arithmetic", (0.4, 0.3, 0.5)),
    "task_arithmetic_strict": ("task_arithmetic", (1.0, 0.6, 1.0)),
    "ties_k20_sum": ("ties_k20_sum", (0.4, 0.3, 0.5)),
}


def tall_deltas() -> list[Tensor]:
    return list(TALL["flat/finetuned"] - TALL["flat/pretrained"])


@pytest.mark.parametrize("name", VECTORS)
def test_masks_of_what_each_task_uses(name):
    options = {"density": 0.2, **VECTORS[name]}
    merged = multi_task_vector(tall_deltas(), [1.0] * 3, Context(), **options)
    close(merged, TALL[f"merged_tv/{name}"], 1e-6)
    for scale in (0.2, 0.3, 0.4, 0.5, 0.6, 1.0):
        masks = torch.stack([task_mask(delta, TALL[f"merged_tv/{name}"], scale) for delta in tall_deltas()])
        assert torch.equal(masks, TALL[f"mask/{name}/lambda{scale}"])


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("agreement", range(5))
@pytest.mark.parametrize("name", SELECTED)
def test_consensus(name, agreement, alpha):
    vector, scales = SELECTED[name]
    ours = INITIALIZATIONS["consensus"](
        tall_deltas(), [1.0] * 3, Context(), **VECTORS[vector], scale=alpha, agreement=agreement, mask_scale=scales
    )
    assert torch.equal(ours != 0, TALL[f"consensus/{name}/k{agreement}/mask"] & (TALL[f"merged_tv/{vector}"] != 0))
    close(TALL["flat/pretrained"] + ours, TALL[f"consensus/{name}/k{agreement}/alpha{alpha}_flat"], 1e-6)
