"""(IA)³ adapters merged into an (IA)³ adapter, or folded into their base: against PEFT, and against each method's formula."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import models
import peft
import pytest
import torch
import transformers
import yaml
from cases import crossed
from hub_server import validate_card
from safetensors.torch import load_file
from torch import Tensor

import mats_hub
from mats_hub.errors import MatsError, NumericalError

PREFIX, VECTOR = "base_model.model.", ".ia3_l"
EXAMPLES = 10
TEXTS = {"text": models.tiny_texts(EXAMPLES, 1)}
FAMILIES = {
    "bert": (
        models.tiny_bert_body,
        {**TEXTS, "label": [0, 1] * 5},
        "SEQ_CLS",
        ({}, {"target_modules": ["query", "value", "output.dense"], "feedforward_modules": ["output.dense"]}),
        ("output.dense",),
    ),
    "gpt2": (
        models.tiny_gpt2,
        TEXTS,
        "CAUSAL_LM",
        ({}, {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": []}),
        ("mlp.c_proj",),
    ),
    "llama": (
        models.tiny_llama,
        TEXTS,
        "CAUSAL_LM",
        ({}, {"target_modules": r".*\.(k_proj|gate_proj|up_proj)", "feedforward_modules": r".*\.up_proj"}),
        ("down_proj", "up_proj"),
    ),
    "t5": (
        models.tiny_t5,
        {**TEXTS, "target": models.tiny_texts(EXAMPLES, 2)},
        "SEQ_2_SEQ_LM",
        ({}, {"target_modules": ["q", "k", "wo", "wi"], "feedforward_modules": ["wo"]}),
        ("wo",),
    ),
    "vit": (
        models.tiny_vit,
        {"image": models.tiny_images(EXAMPLES), "label": [0, 1, 2, 0, 1] * 2},
        None,
        (
            {"target_modules": ["q_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
            {"target_modules": ["v_proj", "fc1"], "feedforward_modules": []},
        ),
        ("fc2",),
    ),
}
"""Factory, data, PEFT's task type, the options of two kinds of adapters, and the endings of modules whose inputs are scaled."""

NAMES = ("one", "two", "other")
WEIGHTS = {"one": 1.0, "two": 0.5, "other": 2.0}


def elected_mean(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """Return the weighted mean, entry by entry, of the values whose sign is that of the weighted sum."""
    values, mass = torch.stack(deltas), torch.tensor(weights).double().reshape(-1, *[1] * deltas[0].dim())
    agree = (values * (values * mass).sum(0) > 0) * mass
    return (values * agree).sum(0) / agree.sum(0).clamp(min=1e-300)


METHODS = {
    "average": ({}, lambda deltas, w: sum(a * d for a, d in zip(w, deltas, strict=True)) / sum(w)),
    "task_arithmetic": ({"scale": 0.6}, lambda deltas, w: 0.6 * sum(a * d for a, d in zip(w, deltas, strict=True))),
    "ties": ({"density": 1.0}, elected_mean),
}
"""Methods that need no statistics: their options, and what they make of task vectors and weights."""


def vectors_in(folder: str | Path) -> dict[str, Tensor]:
    """Return an adapter's vectors by the module they scale, read by safetensors itself."""
    stored = load_file(Path(folder) / "adapter_model.safetensors")
    return {k.removeprefix(PREFIX).removesuffix(VECTOR): v for k, v in stored.items() if k.endswith(VECTOR)}


def entries(family: SimpleNamespace, names=NAMES, weighted: bool = False) -> list[dict]:
    return [{"model": family.folder[name], "weight": WEIGHTS[name] if weighted else 1.0} for name in names]


def expected(family: SimpleNamespace, merge, weights: list[float], names=NAMES) -> dict[str, Tensor]:
    """Return 1 + the merge of l − 1, in float64; an expert that does not scale a module counts as ones."""
    own = [{module: value.double() for module, value in vectors_in(family.folder[name]).items()} for name in names]
    found = {}
    for module, shape in {module: value.shape for held in own for module, value in held.items()}.items():
        deltas = [held.get(module, torch.ones(shape).double()) - 1 for held in own]
        found[module] = 1 + merge(deltas, weights)
    return found


def base_model(family: SimpleNamespace):
    config = transformers.AutoConfig.from_pretrained(family.base)
    name = models.AUTO_CLASSES.get(family.task_type) or config.architectures[0]
    with models.seeded(1):
        return getattr(transformers, name).from_pretrained(family.base).eval()


def scaled_by_hand(model, family: SimpleNamespace, vectors: dict[str, Tensor]):
    """Return a copy of the model with each module's weight (and bias) multiplied by its vector."""
    model = copy.deepcopy(model)
    for name, value in vectors.items():
        module, feedforward = model.get_submodule(name), name.endswith(family.feedforward)
        inputs_are_rows = isinstance(module, transformers.pytorch_utils.Conv1D)
        with torch.no_grad():
            module.weight *= value.reshape((-1, 1) if inputs_are_rows == feedforward else (1, -1))
            if not feedforward and module.bias is not None:
                module.bias *= value.reshape(-1)
    return model


def logits(model, family: SimpleNamespace) -> Tensor:
    ids = torch.randint(6, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if "image" in family.data:
        inputs = {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    elif "target" in family.data:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        return model(**inputs).logits


def close(actual: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert actual.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            actual[name].double(), value.double(), rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def refusal(*arguments, **options) -> str:
    with pytest.raises(MatsError) as caught:
        mats_hub.merge(*arguments, **options)
    return str(caught.value)


def measure(family: SimpleNamespace, folder: str) -> None:
    mats_hub.compute_statistics(
        folder, dataset=datasets.Dataset.from_dict(family.data), kind=["block_fisher", "fisher"], device="cpu",
        output=Path(folder) / "statistics.safetensors",
    )  # fmt: skip


def made(name: str, root: Path, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """Make a base, two (IA)³ adapters of the same modules and one of others, and their statistics."""
    factory, data, task_type, (same, other), feedforward = FAMILIES[name]
    factory(root / "base")
    family = SimpleNamespace(name=name, root=root, base=str(root / "base"), data=data, task_type=task_type)
    family.feedforward, family.folder, family.model = feedforward, {}, {}
    labels = {"labels": 2} if task_type == "SEQ_CLS" else {}
    for seed, (expert, options) in enumerate(zip(NAMES, (same, same, other), strict=True), start=1):
        family.folder[expert] = str(root / expert)
        family.model[expert] = models.ia3_adapter(
            root / "base", root / expert, seed=seed, task_type=task_type, dtype=dtype, **labels, **options
        )
        measure(family, family.folder[expert])
    return family


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp("private-place"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return made("bert", tmp_path_factory.mktemp("private-place"))


# The merged adapter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), crossed(FAMILIES, METHODS), indirect=["family"])
def test_vectors_are_one_plus_the_merge_of_what_experts_add_to_one(family, method):
    options, formula = METHODS[method]
    merged = mats_hub.merge(entries(family, weighted=True), method=method, **options)
    theirs = expected(family, formula, list(WEIGHTS.values()))
    close(vectors_in(merged.folder), theirs)
    union = set().union(*(vectors_in(family.folder[name]) for name in NAMES))
    assert theirs.keys() == union > vectors_in(family.folder["one"]).keys()
    assert len(merged.report.tensors) == len(union)


def test_peft_loads_it_and_scales_what_the_experts_scaled(family):
    merged = mats_hub.merge(entries(family), method="average")
    theirs = expected(family, METHODS["average"][1], [1.0] * 3)
    base = base_model(family)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), merged.folder).eval()  # a warning would be an error
    loaded = {name: p for name, p in model.named_parameters() if "ia3_l" in name}
    close({re.sub(rf"^{PREFIX}|{VECTOR}\.default$", "", name): p.detach() for name, p in loaded.items()}, theirs)
    expert = peft.PeftModel.from_pretrained(copy.deepcopy(base), family.folder["one"]).eval()
    by_hand = logits(scaled_by_hand(base, family, theirs), family)
    torch.testing.assert_close(logits(model, family), by_hand, rtol=1e-4, atol=1e-5)
    for other in (base, expert):
        assert not torch.allclose(logits(other, family), by_hand, atol=1e-3)


def test_feedforward_modules_are_those_whose_inputs_the_experts_scale(family):
    merged = mats_hub.merge(entries(family), method="average")
    config = json.loads((merged.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    modules = set(vectors_in(merged.folder))
    assert set(config["target_modules"]) == modules
    assert set(config["feedforward_modules"]) == {module for module in modules if module.endswith(family.feedforward)}
    assert config["fan_in_fan_out"] == (family.name == "gpt2")
    assert config["task_type"] == (None if family.task_type == "SEQ_CLS" else family.task_type)


def test_folder_card_and_report_speak_of_ia3_and_of_no_path(family):
    merged = mats_hub.merge(entries(family, NAMES[:2]), method="mats", curvature="block_fisher")
    names = {path.name for path in merged.folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "mats_report.json", "tasks"} <= names
    assert not {"config.json", "model.safetensors"} & names
    text = (merged.folder / "README.md").read_text()
    assert validate_card(text) == ([], [])
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert "ia3" in front["tags"]
    assert "lora" not in front["tags"]
    assert "Written as an (IA)³ adapter" in text
    assert "LoRA" not in text
    assert text.count("| (IA)³ adapter |") == 2
    assert {expert["kind"] for expert in merged.report.experts} == {"(IA)³ adapter"}
    plan = str(mats_hub.make_plan(mats_hub.Recipe.build(entries(family), method="average")))
    assert ".ia3_l" in plan
    assert "(IA)³ adapter, weight 1" in plan
    assert "nothing stands in the way" in plan
    for path in merged.folder.rglob("*"):
        if path.is_file():
            assert b"private-place" not in path.read_bytes(), path


def test_it_can_be_merged_again_and_stored_narrower(family):
    merged = mats_hub.merge(entries(family), method="average", dtype="bfloat16")
    vectors = vectors_in(merged.folder)
    assert {value.dtype for value in vectors.values()} == {torch.bfloat16}
    again = mats_hub.merge([str(merged.folder)], base=family.base, method="average", allow_other_base=True)
    assert {record.action for record in again.report.tensors} == {"initialize"}
    assert all(torch.equal(value, vectors[module]) for module, value in vectors_in(again.folder).items())
    assert again.report.experts[0]["kind"] == "(IA)³ adapter"


def test_the_base_weights_are_not_read(family):
    path = Path(family.base) / "model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:length] + b"\xff" * (len(data) - length))  # NaN everywhere
    try:
        merged = mats_hub.merge(entries(family), method="average")
        close(vectors_in(merged.folder), expected(family, METHODS["average"][1], [1.0] * 3))
        with pytest.raises(NumericalError, match="NaN"):
            mats_hub.merge(entries(family), method="average", format="full")
    finally:
        path.write_bytes(data)


# Matching by curvature ---------------------------------------------------------------------------------------------


def fishers(family: SimpleNamespace, module: str, ending: str) -> list[Tensor]:
    """Return each of the first two experts' mean Fisher of a vector, from its statistics file."""
    files = [mats_hub.Statistics.load(Path(family.folder[name]) / "statistics.safetensors") for name in NAMES[:2]]
    return [file.tensor(f"{module}{VECTOR}.{ending}").double() / EXAMPLES for file in files]


SOLVERS = {
    "exact": ({"solver": "exact"}, True),
    "conjugate gradient": ({"iterations": 500}, False),
    "exact, from task arithmetic": ({"solver": "exact", "initialization": "task_arithmetic", "scale": 0.6}, False),
}
"""Options, and whether the experts' weights differ."""


def matched(merged, family: SimpleNamespace, options: dict, weights: list[float], rtol: float) -> set[int]:
    """Check Σ F v = Σ F vᵢ at every vector that two experts share; return how many directions no example is sensitive to.

    Within the larger eigenvectors of Σ F the vector is told to the digit; along the null space it stays where it started.
    """
    start = expected(family, METHODS[options.get("initialization", "average")][1], weights, NAMES[:2])
    own, written = [vectors_in(family.folder[name]) for name in NAMES[:2]], vectors_in(merged.folder)
    assert {record.key for record in merged.report.solved} == {record.key for record in merged.report.tensors}
    assert len(merged.report.solved) == len(own[0]) == len(written)
    unseen = set()
    for module, value in written.items():
        blocks = [w * block for w, block in zip(weights, fishers(family, module, "block_fisher"), strict=True)]
        total, x0 = sum(blocks), start[module].reshape(-1)
        right = [F @ (held[module].double().reshape(-1) - x0) for F, held in zip(blocks, own, strict=True)]
        step, b = value.double().reshape(-1) - x0, sum(right)
        assert float((total @ step - b).norm()) < 1e-4 * float(sum(part.norm() for part in right)), module
        eigenvalues, basis = torch.linalg.eigh(total)
        large, null = (
            basis[:, mask] for mask in (eigenvalues > 1e-3 * eigenvalues[-1], eigenvalues < 1e-8 * eigenvalues[-1])
        )
        solved = torch.linalg.lstsq(large.T @ total @ large, (large.T @ b)[:, None]).solution[:, 0]
        torch.testing.assert_close(large.T @ step, solved, rtol=0, atol=rtol * float(solved.norm()))
        assert float((null.T @ step).norm()) < 5e-3 * float(step.norm()), module
        unseen.add(null.shape[1])
    return unseen


@pytest.mark.parametrize(("family", "solver"), crossed(FAMILIES, SOLVERS), indirect=["family"])
def test_block_fisher_matches_what_each_expert_is_sensitive_to(family, solver):
    options, weighted = SOLVERS[solver]
    merged = mats_hub.merge(entries(family, NAMES[:2], weighted), method="mats", curvature="block_fisher", **options)
    matched(merged, family, options, [WEIGHTS[name] if weighted else 1.0 for name in NAMES[:2]], 5e-3)


def test_diagonal_fisher_is_the_weighted_mean_of_entries(family):
    merged = mats_hub.merge(entries(family, NAMES[:2], True), method="fisher")
    own = [vectors_in(family.folder[name]) for name in NAMES[:2]]
    theirs = {}
    for module in own[0]:
        values = [
            WEIGHTS[name] * fisher.clamp(min=1e-8)
            for name, fisher in zip(NAMES, fishers(family, module, "fisher"), strict=False)
        ]
        theirs[module] = sum(F * held[module] for F, held in zip(values, own, strict=True)) / sum(values)
    close(vectors_in(merged.folder), theirs, 2e-6)
    assert len(merged.report.solved) == len(theirs)


def test_no_method_named_takes_the_block_fisher(bert):
    merged = mats_hub.merge(entries(bert, NAMES[:2]))
    assert (merged.report.recipe["method"], merged.report.recipe["curvature"]["kind"]) == ("mats", "block_fisher")


def test_modules_that_one_expert_does_not_scale_are_named_or_initialized(bert):
    experts = entries(bert, ("one", "other"))
    text = refusal(experts, method="mats", curvature="block_fisher")
    assert "expert 'other' has no block_fisher statistics for 'encoder.layer.0.attention.self.key.ia3_l'" in text
    merged = mats_hub.merge(experts, method="mats", curvature="block_fisher", unmatched="initialize")
    shared = set(vectors_in(bert.folder["one"])) & set(vectors_in(bert.folder["other"]))
    assert len(merged.report.solved) == len(shared)
    theirs = expected(bert, METHODS["average"][1], [1.0] * 2, ("one", "other"))
    written = vectors_in(merged.folder)
    alone = theirs.keys() - shared
    close({module: written[module] for module in alone}, {module: theirs[module] for module in alone})
    assert any(not torch.allclose(written[m].double(), theirs[m], atol=1e-3) for m in shared)


COMING_BACK = [
    ("average", {}),
    ("ties", {"density": 1.0}),
    ("fisher", {}),
    ("mats", {"curvature": "block_fisher", "solver": "exact"}),
    ("mats", {"curvature": "block_fisher", "iterations": 20}),
]


@pytest.mark.parametrize(("family", "how"), crossed(FAMILIES, COMING_BACK), indirect=["family"])
def test_one_expert_and_identical_experts_come_back(family, how):
    method, options = how
    own = vectors_in(family.folder["one"])
    alone = mats_hub.merge([family.folder["one"]], method=method, **options)
    twice = [{"model": family.folder["one"], "name": name, "weight": 0.7} for name in ("a", "b")]
    both = mats_hub.merge(twice, method=method, **options)
    for merged in (alone, both):
        close(vectors_in(merged.folder), own, 2e-7)
        assert len(merged.report.solved) == (len(own) if method in ("mats", "fisher") else 0)
        assert {record.outcome for record in merged.report.solved} <= {"the initialization already solves it"}


# float64 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    return made("bert", tmp_path_factory.mktemp("private-place"), torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_float64_adapters_are_merged_in_float64(double, method):
    options, formula = METHODS[method]
    merged = mats_hub.merge(entries(double, weighted=True), method=method, **options)
    assert {value.dtype for value in vectors_in(merged.folder).values()} == {torch.float64}
    close(vectors_in(merged.folder), expected(double, formula, list(WEIGHTS.values())), 1e-14)
    assert merged.report.environment["compute dtype"] == "float64"


@pytest.mark.parametrize(
    ("options", "rtol"), [({"solver": "exact"}, 1e-5), ({"iterations": 500}, 1e-3)], ids=["exact", "conjugate gradient"]
)
def test_float64_adapters_are_matched_as_far_as_statistics_in_float32_tell(double, options, rtol):
    """Sums in float32 have eigenvalues of ±1e-8 of the largest one that mean nothing, in whatever they are solved."""
    merged = mats_hub.merge(entries(double, NAMES[:2]), method="mats", curvature="block_fisher", **options)
    assert max(matched(merged, double, options, [1.0] * 2, rtol)) > 0, "of 20 examples and 24 entries"


# Heads and tensors held whole --------------------------------------------------------------------------------------


def with_head(base, folder: str):
    """Return a PEFT model's classifier tensors put into a copy of a model, straight from the adapter's file."""
    model, stored = copy.deepcopy(base), load_file(Path(folder) / "adapter_model.safetensors")
    head = {key.removeprefix(PREFIX): value for key, value in stored.items() if "classifier" in key}
    assert set(head) == {"classifier.weight", "classifier.bias"}
    model.load_state_dict(head, strict=False)
    return model


def test_heads_are_kept_per_task(bert):
    merged = mats_hub.merge(entries(bert), method="average")
    assert not any("classifier" in key for key in load_file(merged.folder / "adapter_model.safetensors"))
    theirs, base = expected(bert, METHODS["average"][1], [1.0] * 3), base_model(bert)
    seen = []
    for name in NAMES:
        by_hand = logits(with_head(scaled_by_hand(base, bert, theirs), bert.folder[name]), bert)
        on_peft = peft.PeftModel.from_pretrained(with_head(base, bert.folder[name]), merged.folder).eval()
        ours = logits(merged.load(name), bert)
        torch.testing.assert_close(ours, logits(on_peft, bert), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
        seen.append(ours)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    assert {expert["name"]: sorted(expert["kept"]) for expert in merged.report.experts} == {
        name: ["classifier.bias", "classifier.weight"] for name in NAMES
    }


def test_one_expert_loaded_is_the_expert(bert):
    merged = mats_hub.merge([bert.folder["one"]], method="average")
    own = logits(bert.model["one"], bert)
    torch.testing.assert_close(logits(merged.load("one"), bert), own, rtol=1e-4, atol=1e-5)


def test_tensors_held_whole_are_merged_beside_the_vectors(bert, tmp_path):
    folder = tmp_path / "whole"
    models.ia3_adapter(bert.base, folder, seed=9, labels=2, modules_to_save=["pooler"])
    merged = mats_hub.merge([bert.folder["one"], str(folder)], method="average")
    written = load_file(merged.folder / "adapter_model.safetensors")
    held = load_file(folder / "adapter_model.safetensors")
    base = load_file(Path(bert.base) / "model.safetensors")
    for leaf in ("weight", "bias"):
        name = f"{PREFIX}bert.pooler.dense.{leaf}"
        torch.testing.assert_close(written[name], (base[f"pooler.dense.{leaf}"] + held[name]) / 2, rtol=0, atol=1e-6)
    on_peft = peft.PeftModel.from_pretrained(with_head(base_model(bert), str(folder)), merged.folder).eval()
    torch.testing.assert_close(logits(merged.load("whole"), bert), logits(on_peft, bert), rtol=1e-4, atol=1e-5)


def test_a_head_that_the_base_has_is_merged_as_any_tensor(bert, tmp_path):
    models.tiny_bert_classifier(tmp_path / "base", labels=2)
    for name in ("one", "two"):
        models.ia3_adapter(tmp_path / "base", tmp_path / name, seed=len(name) + ord(name[0]))
    merged = mats_hub.merge([str(tmp_path / name) for name in ("one", "two")], method="average")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, merged.folder).eval()
    held = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for leaf in ("weight", "bias"):
        mean = sum(stored[f"{PREFIX}classifier.{leaf}"] for stored in held) / 2
        torch.testing.assert_close(
            model.get_submodule("base_model.model.classifier.modules_to_save.default").state_dict()[leaf], mean
        )
    torch.testing.assert_close(logits(merged.load(), bert), logits(model, bert), rtol=1e-4, atol=1e-5)


# Folded into the base ----------------------------------------------------------------------------------------------


def folded(family: SimpleNamespace, peft_models: list, merge) -> dict[str, Tensor]:
    """Return the base plus the merge of what PEFT's own merging of each adapter changes, tensor by tensor."""
    states = [models.state(models.merged_lora(model)) for model in peft_models]
    base = models.state(base_model(family))
    keys = [key for key in base if "classifier" not in key or family.task_type is None]
    return {key: base[key] + merge([state[key] - base[key] for state in states]) for key in keys}


def body(merged, family: SimpleNamespace, task: str) -> dict[str, Tensor]:
    state = models.state(merged.load(task))
    return {key: value for key, value in state.items() if "classifier" not in key or family.task_type is None}


@pytest.mark.parametrize(("family", "method"), crossed(FAMILIES, METHODS), indirect=["family"])
def test_a_full_checkpoint_is_the_merge_of_what_peft_makes_of_each(family, method):
    options, formula = METHODS[method]
    merged = mats_hub.merge(entries(family), method=method, format="full", **options)
    assert not (merged.folder / "adapter_config.json").exists()
    own = [family.model[name] for name in NAMES]
    theirs = folded(family, own, lambda deltas: formula([d.double() for d in deltas], [1.0] * 3).float())
    close(body(merged, family, "other"), theirs, 2e-6)
    if method != "ties":  # folding is linear in the vectors, so that merging commutes with it
        by_hand = models.state(scaled_by_hand(base_model(family), family, expected(family, formula, [1.0] * 3)))
        close(theirs, {key: by_hand[key] for key in theirs}, 2e-6)
    assert any("PEFT merges it into its base first" in note for note in merged.report.notes)


LORA_TARGETS = {"bert": "dense", "gpt2": "c_attn", "llama": "k_proj", "t5": "wo", "vit": "v_proj"}


def test_beside_lora_a_full_checkpoint_is_written(family, tmp_path):
    labels = {"labels": 2} if family.task_type == "SEQ_CLS" else {}
    lora = models.lora_adapter(
        family.base, tmp_path / "lora", seed=5, target_modules=[LORA_TARGETS[family.name]], task_type=family.task_type,
        **labels,
    )  # fmt: skip
    experts = [family.folder["one"], str(tmp_path / "lora")]
    merged = mats_hub.merge(experts, method="task_arithmetic", scale=0.5)
    assert not (merged.folder / "adapter_config.json").exists()
    theirs = folded(family, [family.model["one"], lora], lambda deltas: 0.5 * sum(deltas))
    close(body(merged, family, "one"), theirs, 2e-6)
    for order in (experts, experts[::-1]):
        text = refusal(order, method="average", format="adapter")
        assert f"'{family.folder['one']}' is a (IA)³ adapter" in text
        assert "--format full" in text


@pytest.fixture(scope="module")
def grams(bert):
    """Measure the Grams of two adapters' merged modules."""
    found = {}
    for name in ("one", "other"):
        found[name] = mats_hub.compute_statistics(
            bert.folder[name], dataset=datasets.Dataset.from_dict(bert.data), kind="gram", modules="all", device="cpu",
            output=bert.root / f"{name}-grams.safetensors",
        )  # fmt: skip
    return found


def test_grams_of_the_folded_modules_are_matched_in_a_full_checkpoint(bert, grams):
    experts = [{"model": bert.folder[name], "statistics": str(file.path)} for name, file in grams.items()]
    merged = mats_hub.merge(experts, format="full", method="mats", curvature="gram", solver="exact")
    base, written = models.state(base_model(bert)), body(merged, bert, "one")
    folded_states = [models.state(models.merged_lora(bert.model[name])) for name in grams]
    touched = {f"{module}.weight" for name in grams for module in vectors_in(bert.folder[name])}
    assert {f"bert.{r.key}" for r in merged.report.solved if not r.key.endswith(".bias")} == touched
    for key in touched:
        module = key.removesuffix(".weight")
        own = [
            file.tensor(f"{file.aliases.get(module, module)}.input_gram").double() / file.tokens[module]
            for file in grams.values()
        ]
        deltas = [(state[key] - base[key]).double() for state in folded_states]
        right = sum(delta @ gram for delta, gram in zip(deltas, own, strict=True))
        left = (written[key] - base[key]).double() @ sum(own)
        assert float((left - right).norm()) < 1e-3 * float(right.norm()), key


# What is refused ---------------------------------------------------------------------------------------------------


def test_a_rank_is_refused(bert):
    for options in ({}, {"format": "adapter"}):
        assert "leave 'rank' out" in refusal(entries(bert), method="average", rank=4, **options)


ON_NOTHING = {
    "blocks of vectors in a full checkpoint": {"curvature": "block_fisher", "format": "full"},
    "task vectors that are no matrices": {"curvature": "task_vector"},
    "Grams in an adapter of vectors": {"curvature": "gram"},
}


@pytest.mark.parametrize("name", ON_NOTHING)
def test_a_curvature_that_acts_on_no_tensor_is_refused_and_not_passed_over(bert, grams, name):
    options = ON_NOTHING[name]
    experts = entries(bert, ("one", "two"))
    if options["curvature"] == "gram":
        experts = [{"model": bert.folder[name], "statistics": str(file.path)} for name, file in grams.items()]
    assert options["curvature"] in refusal(experts, method="mats", **options)


def test_a_module_scaled_at_its_input_and_at_its_output_is_refused(bert, tmp_path):
    for name, modules, feedforward in (
        ("inner", ["intermediate.dense"], ["intermediate.dense"]),
        ("outer", ["intermediate.dense", "key"], []),
        ("square", ["key", "attention.output.dense"], []),  # of as many inputs as outputs
    ):
        models.ia3_adapter(
            bert.base, tmp_path / name, seed=7, labels=2, target_modules=modules, feedforward_modules=feedforward
        )
    for pair, module in (
        ((tmp_path / "inner", tmp_path / "outer"), "encoder.layer.0.intermediate.dense"),
        ((bert.folder["one"], tmp_path / "square"), "encoder.layer.0.attention.output.dense"),
    ):
        for order in (pair, pair[::-1]):
            text = refusal([str(folder) for folder in order], method="average")
            assert f"expert '{Path(order[1]).name}'" in text
            assert module in text


def test_another_experts_list_of_feedforward_modules_says_nothing_of_a_vector(bert, tmp_path):
    for number, feedforward in ((0, ["output.dense"]), (1, [])):
        models.ia3_adapter(
            bert.base, tmp_path / f"layer{number}", seed=7 + number, labels=2,
            target_modules=rf".*layer\.{number}\.output\.dense", feedforward_modules=feedforward,
        )  # fmt: skip
    merged = mats_hub.merge([str(tmp_path / "layer0"), str(tmp_path / "layer1")], method="average")
    assert {name: tuple(value.shape) for name, value in vectors_in(merged.folder).items()} == {
        "bert.encoder.layer.0.output.dense": (1, 24),
        "bert.encoder.layer.1.output.dense": (16, 1),
    }
    model = peft.PeftModel.from_pretrained(base_model(bert), merged.folder)
    loaded = dict(model.named_parameters())
    for name, value in vectors_in(merged.folder).items():
        assert torch.equal(loaded[f"{PREFIX}{name}{VECTOR}.default"], value)


def test_adapters_of_the_body_and_of_the_body_with_a_head_share_names(bert, tmp_path):
    models.ia3_adapter(
        bert.base, tmp_path / "body", seed=8, task_type="FEATURE_EXTRACTION", target_modules=["query", "key"],
        feedforward_modules=[],
    )  # fmt: skip
    names = {}
    for order in ((str(tmp_path / "body"), bert.folder["one"]), (bert.folder["one"], str(tmp_path / "body"))):
        merged = mats_hub.merge(list(order), method="average")
        names = {module.removeprefix("bert.") for module in vectors_in(merged.folder)}
        assert len(names) == 2 * 5
        heads = {module.startswith("bert.") for module in vectors_in(merged.folder)}
        assert len(heads) == 1, "PEFT looks for all of them in one model"


def test_damaged_vectors_are_an_error_that_names_them(bert, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "damaged"
    models.ia3_adapter(bert.base, folder, seed=7, labels=2)
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    key = f"{PREFIX}bert.encoder.layer.1.attention.self.key{VECTOR}"
    save_file({**stored, key: stored[key] * torch.nan}, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"expert 'damaged' has a NaN .* 'encoder\.layer\.1\.attention\.self\.key"):
        mats_hub.merge([bert.folder["one"], str(folder)], method="average")
    save_file({**stored, key: torch.ones(16, 16)}, path, metadata={"format": "pt"})
    assert f"tensor '{key}' is none that a (IA)³ adapter has" in refusal([bert.folder["one"], str(folder)])
