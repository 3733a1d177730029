"""LoRA adapters merged into a LoRA adapter: loaded by PEFT it is the dense merge, and the base's weights are not read.

What is merged by hand here is made of PEFT's own merge of every expert into the base, minus the base, in float64.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import models
import peft
import pytest
import torch
import transformers
import yaml
from cases import crossed
from hub_server import validate_card
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_loading import tiny_gpt_oss, tiny_mixtral, tiny_resnet, tiny_whisper
from torch import Tensor

import mats_hub
from mats_hub.adapter_merging import merge_adapters
from mats_hub.architecture import describe
from mats_hub.checkpoint import Checkpoint
from mats_hub.errors import MatsError, NumericalError, PlanError
from mats_hub.report import TensorRecord
from mats_hub.source import open_source
from mats_hub.statistics.file import Statistics

bert, gpt2, llama, t5, vit = (
    models.tiny_bert_body,
    models.tiny_gpt2,
    models.tiny_llama,
    models.tiny_t5,
    models.tiny_vit,
)
BODY, CAUSAL, SEQ2SEQ = ({"task_type": name} for name in ("FEATURE_EXTRACTION", "CAUSAL_LM", "SEQ_2_SEQ_LM"))
HEAD, NONE = {"task_type": "SEQ_CLS"}, {"task_type": None}


def on(*modules: str, **options: Any) -> dict[str, Any]:
    """Return the options of an adapter of these modules."""
    return {"target_modules": modules, **options}


def at(*parameters: str, **options: Any) -> dict[str, Any]:
    """Return the options of an adapter of these bare parameters."""
    return {"target_modules": [], "target_parameters": list(parameters), **options}


ALL = {"target_modules": "all-linear"}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
VARIANTS: dict[str, tuple[Any, ...]] = {
    # name: base, what the adapters have in common, what each of them has of its own
    "plain": (bert, BODY, {}, {}, {}),
    "ranks that differ": (gpt2, CAUSAL | on("c_attn"), {"r": 1}, {"r": 3}, {"r": 5, "alpha": 3}),
    "modules that differ": (llama, CAUSAL, on("q_proj"), on("v_proj", "up_proj"), ALL),
    "modules by expression": (
        t5,
        SEQ2SEQ,
        on("q", "wo"),
        {"target_modules": r"encoder.*\.k"},
        {"target_modules": r".*EncDecAttention\.(q|v)"},
    ),
    "modules renamed in checkpoints that differ": (vit, NONE, on("projection"), on("q_proj"), on("fc1", "q_proj")),
    "one layer each": (llama, CAUSAL | on("q_proj"), {"layers_to_transform": [1]}, {"layers_to_transform": [0]}),
    "rsLoRA": (t5, SEQ2SEQ | on("q", "wo"), {"rslora": True, "r": 3}, {"r": 2}, {"rslora": True, "r": 5, "alpha": 1}),
    "rank pattern": (
        vit,
        NONE | ALL,
        {"rank_pattern": {"q_proj": 2, r"layers\.1.*fc1": 7}},
        {"rank_pattern": {"o_proj": 1}},
    ),
    "alpha pattern": (
        llama,
        CAUSAL | on("q_proj", "down_proj"),
        {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 31}},
        {"alpha_pattern": {"down_proj": 0.5}},
    ),
    "both patterns and rsLoRA": (
        bert,
        BODY | on("query", "dense"),
        {"alpha_pattern": {"dense": 3}, "rank_pattern": {"query": 5}, "rslora": True},
        {"rank_pattern": {"attention.output.dense": 1}},
    ),
    "Conv1D": (gpt2, CAUSAL | on("c_attn", "c_proj", "c_fc", fan_in_fan_out=True), {}, {"r": 2}),
    "Conv1D beside Linear": (
        partial(gpt2, tie_word_embeddings=False),
        CAUSAL | on("attn.c_proj", "lm_head"),
        {},
        {"r": 2},
        on("lm_head"),
    ),
    "embedding": (bert, BODY | on("word_embeddings", "query"), {}, {"r": 2, "rslora": True}),
    "embedding that PEFT saves as well": (llama, CAUSAL | on("embed_tokens", "q_proj"), {}, {"r": 2}),
    "embedding beside Conv1D": (gpt2, CAUSAL | on("wpe", "c_attn", fan_in_fan_out=True), {}, {"r": 2}),
    "embedding, whole in another": (
        llama,
        CAUSAL,
        on("embed_tokens", "q_proj"),
        on("q_proj", modules_to_save=["embed_tokens"]),
    ),
    "tied embedding": (gpt2, CAUSAL | on("wte", "c_attn", fan_in_fan_out=True), {}, {"r": 2}),
    "shared embedding": (t5, SEQ2SEQ | on("shared", "q"), {}, {"r": 2}),
    "tied embedding, whole": (gpt2, CAUSAL | on("c_attn", modules_to_save=["wte"]), {}, {"r": 2}),
    "tied head, whole": (gpt2, CAUSAL | on("c_attn", modules_to_save=["lm_head"]), {}, {"r": 2}),
    "shared embedding's head, whole": (t5, SEQ2SEQ | on("q", modules_to_save=["lm_head"]), {}, {"r": 2}),
    "language model's head, whole": (llama, CAUSAL | on("q_proj", modules_to_save=["lm_head"]), {}, {}),
    "pooler, whole in one": (bert, BODY, {"modules_to_save": ["pooler"]}, {"r": 2}),
    "pooler, whole in one and factors in another": (bert, BODY, on("pooler.dense"), {"modules_to_save": ["pooler"]}),
    "LayerNorm, whole": (bert, BODY | {"modules_to_save": ["LayerNorm"]}, {}, {}),
    "heads of their own": (bert, HEAD, {"labels": 2}, {"labels": 3}),
    "heads of their own, all biases": (bert, HEAD | {"bias": "all"}, {"labels": 2}, {"labels": 3}),
    "head of the base": (models.tiny_bert_classifier, HEAD, {}, {}),
    "head of a ViT": (vit, NONE | on("q_proj", modules_to_save=["classifier"]), {}, {}),
    "all biases": (bert, BODY | {"bias": "all"}, {}, {"r": 2}),
    "all biases of one": (bert, BODY, {}, {"bias": "all"}),
    "all biases beside a whole module": (bert, BODY | {"bias": "all", "modules_to_save": ["pooler"]}, {}, {}),
    "biases of the modules": (bert, BODY | {"bias": "lora_only"}, {}, on("value")),
    "biases of Conv1D": (gpt2, CAUSAL | on("c_attn", bias="lora_only", fan_in_fan_out=True), {}, {}),
    "biases of a ViT": (vit, NONE | ALL | {"bias": "all"}, {}, {}),
    "Conv2d": (vit, NONE | on("projection", "q_proj"), {}, {"r": 2, "rslora": True}),
    "Conv2d and its bias": (vit, NONE | on("projection", "q_proj", bias="lora_only"), {}, {}),
    "Conv2d of several sizes": (tiny_resnet, NONE | on("convolution", modules_to_save=["classifier.1"]), {}, {"r": 1}),
    "Conv1d": (tiny_whisper, NONE | on("conv1", "conv2", "q_proj"), {}, {"r": 2}),
    "bare matrices": (
        llama,
        CAUSAL | at("q_proj.weight", "down_proj.weight"),
        {},
        {"r": 2, "alpha_pattern": {"q_proj.weight": 1}},
    ),
    "bare matrices that differ": (llama, CAUSAL, at("q_proj.weight"), at("v_proj.weight")),
    "bare matrices beside modules": (
        llama,
        CAUSAL,
        at("q_proj.weight"),
        on("v_proj", target_parameters=["q_proj.weight"]),
    ),
    "bare in one, a module in another": (llama, CAUSAL, at("q_proj.weight"), on("q_proj", "v_proj")),
    "bare Conv1D": (gpt2, CAUSAL | at("c_attn.weight"), {}, {"r": 2}),
    "bare Conv1D in one": (gpt2, CAUSAL, at("c_attn.weight"), on("c_attn", fan_in_fan_out=True)),
    "bare embedding": (llama, CAUSAL | at("embed_tokens.weight"), {}, {"r": 2}),
    "bare embedding in one": (llama, CAUSAL, at("embed_tokens.weight"), on("embed_tokens")),
    "bare router": (tiny_gpt_oss, CAUSAL | at("mlp.router.weight"), {}, {"r": 2}),
    "bare router of one layer": (
        tiny_mixtral,
        CAUSAL,
        at("layers.0.mlp.gate.weight"),
        at("layers.0.mlp.gate.weight", EXPERTS[1]),
    ),
    "stacked, first": (tiny_mixtral, CAUSAL | at(EXPERTS[0]), {}, {"r": 2}),
    "stacked, second": (tiny_mixtral, CAUSAL | at(EXPERTS[1]), {"rslora": True}, {"r": 2}),
    "stacked, both": (tiny_mixtral, CAUSAL | at(*EXPERTS), {}, {"r": 2}),
    "stacked, one each": (tiny_mixtral, CAUSAL, at(EXPERTS[1]), at(EXPERTS[0])),
    "stacked, other layers": (
        tiny_mixtral,
        CAUSAL,
        at(f"layers.0.{EXPERTS[1]}"),
        at(*(f"layers.1.{name}" for name in EXPERTS)),
    ),
    "stacked, patterns": (
        tiny_mixtral,
        CAUSAL | on("q_proj", target_parameters=[EXPERTS[1]]),
        {"rslora": True},
        {"alpha_pattern": {"experts.down_proj": 3}, "rank_pattern": {"experts.down_proj": 2}},
    ),
    "stacked, all linear modules": (tiny_mixtral, CAUSAL | ALL, {}, {"r": 2}),
    "stacked, transposed": (tiny_gpt_oss, CAUSAL | at(*EXPERTS), {}, {"r": 2}),
    "stacked, transposed, first": (tiny_gpt_oss, CAUSAL | at(EXPERTS[0]), {}, {"r": 2}),
    "stacked, transposed, one each": (tiny_gpt_oss, CAUSAL, at(EXPERTS[1]), at(EXPERTS[0])),
    "stacked, transposed, beside modules": (
        tiny_gpt_oss,
        CAUSAL | on("q_proj", "o_proj", target_parameters=list(EXPERTS)),
        {},
        {"r": 2},
    ),
}
KEPT = [name for name in VARIANTS if name.startswith("heads of their own")]
MERGED_ALONE = ("tied embedding", "shared embedding", "Conv1d")
"""Unmerged, PEFT's adapter of a tied embedding changes one of its two uses, and merged, both; Whisper does not run on
PEFT's unmerged Conv1d."""

WEIGHTS = (1, 2.5, 0.5)
LINEAR: dict[str, tuple[dict[str, Any], Sequence[float], Callable[[Tensor], Tensor]]] = {
    # name: options, the experts' weights, the factors of their task vectors
    "average": ({"method": "average"}, (1, 1, 1), lambda w: w / w.sum()),
    "task arithmetic": ({"method": "task_arithmetic", "scale": 0.6}, (1, 1, 1), lambda w: 0.6 * w),
    "weighted average": ({"method": "average"}, WEIGHTS, lambda w: w / w.sum()),
    "weighted task arithmetic": ({"method": "task_arithmetic", "scale": -0.4}, WEIGHTS, lambda w: -0.4 * w),
}


@dataclass(frozen=True)
class Case:
    """A base and its adapters, all stored in float64, and what PEFT's merge of each adapter changes.

    Attributes:
        root: holds ``base`` and the adapters ``e0``, ``e1``, …
        class_name: the transformers class the adapters were made for.
        before: the base's tensors, as its model calls them.
        deltas: of each adapter, by the same names; what not all models have (heads) is left out.

    """

    root: Path
    class_name: str
    before: dict[str, Tensor]
    deltas: list[dict[str, Tensor]]

    @property
    def base(self) -> str:
        return str(self.root / "base")

    @property
    def experts(self) -> list[str]:
        return [str(self.root / f"e{index}") for index in range(len(self.deltas))]

    def entries(self, weights: Sequence[float]) -> list[dict[str, Any]]:
        return [{"model": model, "weight": w} for model, w in zip(self.experts, weights, strict=False)]

    def dense(self, factors: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """Return Σ factor · task vector."""
        pairs = list(zip(factors, self.deltas, strict=False))
        return {key: sum(float(f) * delta[key] for f, delta in pairs) for key in self.deltas[0]}

    def model(self, labels: int | None = None) -> Any:
        return base_model(self.root / "base", self.class_name, labels)

    def adapted(self, folder: Path | str, labels: int | None = None) -> Any:
        return adapted(self.model(labels), folder)

    def changes(self, model: Any) -> dict[str, Tensor]:
        """Return what a PEFT model changes once it is merged."""
        return minus(merged_state(model), self.before)


def base_model(folder: Path, class_name: str, labels: int | None = None) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder, **({"num_labels": labels} if labels else {}))
    # The grouped product of matrices is not made for float64.
    how = {"experts_implementation": "eager"} if getattr(config, "num_local_experts", None) else {}
    with models.seeded(5):
        model = getattr(transformers, class_name)
        return model.from_pretrained(folder, config=config, dtype=torch.float64, **how).eval()


def adapted(model: Any, folder: Path | str) -> Any:
    """Return PEFT's model of an adapter, every tensor of which found its place."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = peft.PeftModel.from_pretrained(model, folder).eval()
        known = peft.get_peft_model_state_dict(found, save_embedding_layers=False)
    assert not [warning for warning in told if "missing adapter keys" in str(warning.message)]
    held = {name for name in load_file(Path(folder) / "adapter_model.safetensors") if "base_layer.weight" not in name}
    assert held <= set(known) | {name for name in held if name.endswith(".bias")}
    assert {name for name in known if "lora_" in name} <= held
    return found


def merged_state(model: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging into one of two tied weights
        return models.state(model.merge_and_unload())


def minus(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: after[key] - value
        for key, value in before.items()
        if value.is_floating_point() and key in after and after[key].shape == value.shape
    }


def widen(folder: Path) -> None:
    """Store a folder's weights in float64, with values that no float32 has."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: 1.1 * t.double() if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def rounded(folder: Path, target: Path) -> Path:
    """Copy a folder, its weights rounded to float32."""
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def make_case(root: Path, factory: Callable[[Path], Any], common: dict[str, Any], *each: dict[str, Any]) -> Case:
    factory(root / "base")
    for index, options in enumerate(each):
        models.lora_adapter(root / "base", root / f"e{index}", seed=index + 1, **common | options)
    for folder in root.iterdir():
        widen(folder)
    config = json.loads((root / "base" / "config.json").read_text())
    class_name = models.AUTO_CLASSES.get(common["task_type"] or "", config["architectures"][0])
    before = models.state(base_model(root / "base", class_name))
    stored = Checkpoint(open_source(root / "base")).headers
    if not any(key.startswith("classifier") for key in stored):
        before = {key: value for key, value in before.items() if not key.startswith("classifier")}
    deltas = []
    for index, options in enumerate(each):
        labels = (common | options).get("labels")
        model = adapted(base_model(root / "base", class_name, labels), root / f"e{index}")
        deltas.append(minus(merged_state(model), before))
    assert all(delta.keys() == deltas[0].keys() for delta in deltas)
    assert all(any(value.abs().max() > 1e-2 for value in delta.values()) for delta in deltas)
    return Case(root, class_name, before, deltas)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Hand out the variants, each made once."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make_case(tmp_path_factory.mktemp("case"), *VARIANTS[name])
        return made[name]

    return get


def write(experts: Sequence[Any], folder: Path, **options: Any) -> dict[str, TensorRecord]:
    """Merge adapters into an adapter, without the card; return the records by key."""
    plan = mats_hub.make_plan(mats_hub.Recipe.build(experts, **options))
    plan.raise_problems()
    assert plan.recipe.output.format == "adapter"
    folder.mkdir()
    return {record.key: record for record in merge_adapters(plan, folder, torch.device("cpu"), {})}


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare tensor by tensor, relative to its largest entry; what should not change must not change at all."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        atol = tolerance * float(value.abs().max())
        torch.testing.assert_close(
            got[key].to(value), value, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def outputs(model: Any) -> Tensor:
    """Return everything a model puts out for a fixed input, as one vector."""
    tokens = torch.arange(6, 18).view(2, 6)
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    match model.config.model_type:
        case "vit" | "resnet":
            given = {"pixel_values": noise(2, 3, 8, 8)}
        case "whisper":
            given = {"input_features": noise(2, 8, 16), "decoder_input_ids": tokens}
        case "t5":
            given = {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
        case _:
            given = {"input_ids": tokens}
    with torch.no_grad():
        found = model(**given)
    return torch.cat([value.flatten() for value in found.values() if isinstance(value, Tensor)])


def with_changes(model: Any, changes: Mapping[str, Tensor]) -> Any:
    """Add changes to a model in place, after parting its tied weights."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(parameter.detach().clone()))
    for key, tensor in model.state_dict().items():
        if key in changes:
            tensor.add_(changes[key])
    return model


# --- linear methods: nothing is lost


LLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens")
CHOSEN = st.sampled_from(LLAMA_MODULES)
ADAPTERS = st.fixed_dictionaries(
    {
        "target_modules": st.lists(CHOSEN, min_size=1, max_size=4, unique=True),
        "r": st.integers(1, 6),
        "alpha": st.integers(1, 16),
        "rslora": st.booleans(),
        "rank_pattern": st.dictionaries(CHOSEN, st.integers(1, 6), max_size=2),
        "alpha_pattern": st.dictionaries(CHOSEN, st.integers(1, 16), max_size=2),
    }
)


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(each=st.lists(ADAPTERS, min_size=1, max_size=4), method=st.sampled_from(sorted(LINEAR)))
def test_any_ranks_modules_patterns_and_number_of_experts(tmp_path_factory, each, method):
    root = tmp_path_factory.mktemp("any")
    made = make_case(root / "case", llama, CAUSAL, *each)
    options, weights, factors = LINEAR[method]
    weights = [*weights, 1.0][: len(each)]
    write(made.entries(weights), root / "merged", base=made.base, **options)
    want = made.dense(factors(torch.tensor(weights, dtype=torch.float64)))
    assert_near(made.changes(made.adapted(root / "merged")), want, 1e-10)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 2 else ()) for i, name in enumerate(VARIANTS)]
)
def test_loaded_by_peft_the_adapter_is_the_dense_merge(case, name, tmp_path):
    made = case(name)
    for title, (options, weights, factors) in LINEAR.items():
        if name != "plain" and "weighted" not in title:
            continue  # weights that are equal are no other case
        folder = tmp_path / title
        records = write(made.entries(weights), folder, base=made.base, **options)
        want = made.dense(factors(torch.tensor(weights[: len(made.deltas)], dtype=torch.float64)))
        model = made.adapted(folder)
        if title == "weighted average" and name not in MERGED_ALONE:
            dense, plain = outputs(with_changes(made.model(), want)), outputs(made.model())
            assert (dense - plain).abs().max() > 1e-3
            # The norms of Llama and T5 compute in float32.
            torch.testing.assert_close(outputs(model), dense, rtol=1e-6, atol=1e-6)
        assert_near(made.changes(model), want, 1e-10)
        assert all(record.truncation == 0 for record in records.values() if record.rank)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 3 else ()) for i, name in enumerate(VARIANTS)]
)
def test_in_float32_and_through_the_front_door(case, name, tmp_path):
    """The whole of `merge` and `load`, where files hold float32."""
    made = case(name)
    for folder in made.root.iterdir():
        rounded(folder, tmp_path / folder.name)
    experts = [
        {"model": str(tmp_path / Path(expert).name), "weight": w}
        for expert, w in zip(made.experts, WEIGHTS, strict=False)
    ]
    options = {"base": str(tmp_path / "base"), "method": "average", "allow_other_base": True}
    merged = mats_hub.merge(experts, output=tmp_path / "merged", **options)
    assert not (merged.folder / "config.json").exists()
    stored = load_file(merged.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    task = "e0" if name in KEPT else None
    after = merged.load(task, dtype="float64", base=made.base).state_dict()
    weights = torch.tensor(WEIGHTS[: len(made.deltas)], dtype=torch.float64)
    assert_near(minus(after, made.before), made.dense(weights / weights.sum()), 1e-5)


@pytest.mark.parametrize("name", KEPT)
def test_heads_are_kept_per_task(case, name, tmp_path):
    made = case(name)
    merged = mats_hub.merge(made.experts, base=made.base, method="average")
    want = made.dense([0.5, 0.5])
    for index, labels in enumerate((2, 3)):
        own = models.state(made.adapted(made.experts[index], labels).merge_and_unload())
        head = {key: own[key] for key in ("classifier.weight", "classifier.bias")}
        model = merged.load(f"e{index}", dtype="float64", base=made.base)
        dense = with_changes(made.model(labels), want)
        dense.load_state_dict(head, strict=False)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in head.items())
        torch.testing.assert_close(outputs(model), outputs(dense), rtol=1e-9, atol=1e-9)
        assert model.config.num_labels == labels


@pytest.mark.parametrize("order", [("body", "classifier"), ("classifier", "body")], ids=" then ".join)
def test_a_body_and_a_classifier_are_merged(tmp_path, order):
    """One adapter calls a tensor ``encoder…``, the other ``bert.encoder…``."""
    bert(tmp_path / "base")
    models.lora_adapter(tmp_path / "base", tmp_path / "body", seed=1, **BODY)
    models.lora_adapter(tmp_path / "base", tmp_path / "classifier", seed=2, labels=3, **HEAD)
    folders = [str(tmp_path / name) for name in order]
    merged = mats_hub.merge(folders, method="average", format="adapter")
    full = mats_hub.merge(folders, method="average", format="full")
    for task in order:
        ours, theirs = merged.load(task), full.load(task)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)
        assert type(ours) is type(theirs)


@pytest.mark.parametrize("name", ["tied embedding, whole", "tied head, whole", "shared embedding's head, whole"])
def test_a_full_merge_of_tied_weights_held_whole_is_the_same_model_or_refused(case, name):
    made = case(name)
    try:
        merged = mats_hub.merge(made.experts, base=made.base, method="average", format="full")
    except PlanError as error:
        assert "tied" in str(error)  # noqa: PT017
        return
    model = merged.load("e0" if any(expert["kept"] for expert in merged.report.experts) else None, dtype="float64")
    want = made.dense([0.5, 0.5])
    if any(expert["kept"] for expert in merged.report.experts):
        want["lm_head.weight"] = made.deltas[0]["lm_head.weight"]
    assert_near(minus(models.state(model), made.before), want, 1e-10)


@pytest.mark.parametrize("name", ["plain", "pooler, whole in one", "head of a ViT", "all biases", "Conv1D"])
def test_the_config_asks_for_biases_only_where_there_are_some(case, name, tmp_path):
    """PEFT loads a second adapter beside one with biases only when neither has any."""
    made = case(name)
    write(made.experts, tmp_path / "merged", base=made.base, method="average")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["bias"] == ("all" if name == "all biases" else "none")
    model = made.adapted(tmp_path / "merged")
    if name not in ("all biases", "pooler, whole in one"):  # PEFT wants what one adapter replaces in the other, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_adapter(made.experts[0], adapter_name="second")
        assert set(model.peft_config) == {"default", "second"}


@pytest.mark.parametrize("name", ["Conv2d of several sizes", "embedding, whole in another", "stacked, both"])
def test_a_merged_adapter_can_be_merged_again(case, name, tmp_path):
    made = case(name)
    write(made.experts, tmp_path / "once", base=made.base, method="average")
    entries = [{"model": str(tmp_path / "once"), "weight": 2}, made.experts[0]]
    write(entries, tmp_path / "twice", base=made.base, method="average", allow_other_base=True)
    share = 2 / 3 / len(made.deltas)
    want = made.dense([share + 1 / 3, *(share for _ in made.deltas[1:])])
    assert_near(made.changes(made.adapted(tmp_path / "twice")), want, 1e-10)


def test_tensors_left_out_by_the_recipe_are_not_written(case, tmp_path):
    made = case("plain")
    records = write(made.experts, tmp_path / "merged", base=made.base, method="average", exclude=["*query*"])
    want = {key: value * ("query" not in key) for key, value in made.dense([1 / 3] * 3).items()}
    assert_near(made.changes(made.adapted(tmp_path / "merged")), want, 1e-10)
    assert {record.action for key, record in records.items() if "query" in key} == {"copy"}


def test_a_change_in_factors_is_kept_per_task_or_refused(case):
    made = case("plain")
    with pytest.raises(MatsError, match=r"query\.weight"):
        mats_hub.merge(made.experts, base=made.base, method="average", keep_per_task=["*query.weight"])


# --- methods that are not linear go through the dense matrix


def ties_by_hand(deltas: Sequence[Tensor]) -> Tensor:
    """Return the mean of the entries that agree with the sign of their sum, nothing trimmed."""
    stacked = torch.stack(list(deltas))
    agrees = (stacked > 0) == (stacked.sum(0) >= 0)
    agrees &= stacked != 0
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize(
    "name",
    [
        *("ranks that differ", "modules that differ", "embedding", "Conv1D beside Linear", "Conv2d of several sizes"),
        *("pooler, whole in one and factors in another", "stacked, both", "stacked, transposed, one each"),
        *("bare in one, a module in another", "bare Conv1D in one", "biases of Conv1D", "Conv1d"),
    ],
)
def test_ties_is_merged_dense_and_factored(case, name, tmp_path):
    made = case(name)
    options = {"method": "ties", "density": 1.0, "trim": "per_tensor", "rank": 10_000}
    records = write(made.experts, tmp_path / "merged", base=made.base, **options)
    want = {key: ties_by_hand([delta[key] for delta in made.deltas]) for key in made.deltas[0]}
    assert_near(made.changes(made.adapted(tmp_path / "merged")), want, 1e-10)
    assert all(record.truncation < 1e-10 for record in records.values() if record.rank)


# --- a rank that was asked for


def in_model(made: Case) -> Callable[[str], str]:
    """Return the map from a record's key, as checkpoints call the tensor, to its name in the adapters' model."""
    config = json.loads((Path(made.base) / "config.json").read_text())
    names = {other: name for name, other in describe(config).stored_names.items()}

    def find(key: str) -> str:
        name = names.get(key, key)
        return next(known for known in made.before if known.endswith(name))

    return find


def matrices(value: Tensor) -> Tensor:
    """Return a weight as the matrices that its factors make: ``[…, out, in]``, perhaps transposed."""
    return value.flatten(1) if value.dim() == 4 or (value.dim() == 3 and value.shape[-1] < 4) else value


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "Conv1D", "embedding", "rank pattern", "Conv2d of several sizes", "Conv1d", "bare matrices"),
        *("stacked, both", "stacked, transposed"),
    ],
)
def test_the_cut_is_the_best_approximation_of_its_rank(case, name, rank, tmp_path):
    made = case(name)
    records = write(made.experts, tmp_path / "merged", base=made.base, method="average", rank=rank)
    got = made.changes(made.adapted(tmp_path / "merged"))
    dense, find = made.dense([1 / len(made.deltas)] * len(made.deltas)), in_model(made)
    cut = {find(key): record for key, record in records.items() if record.rank}
    assert cut
    errors = []
    for key, record in cut.items():
        U, S, Vh = torch.linalg.svd(matrices(dense[key]), full_matrices=False)
        assert record.rank == min(rank, S.shape[-1])
        best = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
        assert_near({key: got[key]}, {key: best.reshape(dense[key].shape)}, 1e-8)
        errors.append(float(S[..., rank:].norm() / S.norm()))
        assert record.truncation == pytest.approx(errors[-1], rel=1e-8, abs=1e-12)
        assert record.weighted_truncation is None
        assert record.solution_norm == pytest.approx(float(dense[key].norm()), rel=1e-8)
    assert max(errors) > 0.05


# --- curvatures: the same steps on small matrices


TEXTS = {"text": models.tiny_texts(8, 1)}
MEASURED: dict[str, tuple[dict[str, Any], Any, dict[str, Any], list[str]]] = {
    # name: data, base, what the adapters have in common, their modules, of which the last adapter has only the first
    "bert": (TEXTS | {"label": [0, 1] * 4}, bert, HEAD | {"labels": 2}, ["query", "dense"]),
    "gpt2": (TEXTS, gpt2, CAUSAL | {"fan_in_fan_out": True}, ["c_attn", "attn.c_proj"]),
    "llama": (TEXTS, llama, CAUSAL, ["q_proj", "v_proj", "down_proj"]),
    "t5": (TEXTS | {"target": models.tiny_texts(8, 2)}, t5, SEQ2SEQ, ["q", "wo"]),
}
MATS = {"method": "mats"}
CURVED: dict[str, dict[str, Any]] = {
    "RegMean": {"method": "regmean"},
    "Gram": MATS | {"curvature": "gram", "iterations": 3},
    "Gram, normalized": MATS | {"curvature": "gram", "iterations": 3, "normalization": "trace"},
    "Gram, exact": MATS | {"curvature": "gram", "solver": "exact", "initialization": "task_arithmetic", "scale": 0.5},
    "task vectors": MATS | {"curvature": "task_vector", "iterations": 3},
    "task vectors from another start": MATS
    | {"curvature": "task_vector", "iterations": 2, "initialization": "task_arithmetic", "scale": 0.5},
    "task vectors, normalized": MATS | {"curvature": "task_vector", "iterations": 3, "normalization": "frobenius"},
    "task vectors, their diagonal more": MATS | {"curvature": "task_vector", "iterations": 3, "off_diagonal": 0.7},
    "K-FAC within the factors": MATS | {"iterations": 4, "subspace": "factors"},
    "K-FAC, dense": MATS | {"iterations": 4},
    "RegMean, damped": {"method": "regmean", "damping": 0.3},
    "K-FAC, damped": MATS | {"iterations": 4, "damping": 0.3, "initialization": "task_arithmetic", "scale": 0.5},
    "K-FAC within the factors, damped": MATS | {"iterations": 4, "subspace": "factors", "damping": 0.3},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Hand out bases with three adapters that have statistics, each made once."""
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            data, factory, common, modules = MEASURED[family]
            each = ({"r": 2}, {"r": 3, "alpha": 4, "rslora": True}, {"r": 2, "alpha_pattern": {modules[0]: 6}})
            targets = [on(*modules), on(*modules), on(modules[0])]
            options = [one | target for one, target in zip(each, targets, strict=True)]
            made[family] = make_case(tmp_path_factory.mktemp(family), factory, common, *options)
            for folder in map(Path, made[family].experts):
                mats_hub.compute_statistics(
                    folder,
                    dataset=datasets.Dataset.from_dict(data),
                    kind="kfac",
                    modules="all",
                    output=folder / "statistics.safetensors",
                )
        return made[family]

    return get


@dataclass(frozen=True)
class System:
    """The system Σ wᵢ Bᵢ X Aᵢ = Σ wᵢ Bᵢ δᵢ Aᵢ of one weight ``[out, in]``, written out; Bᵢ is None for the identity."""

    terms: list[tuple[float, Tensor | None, Tensor, Tensor]]

    def apply(self, X: Tensor) -> Tensor:
        return sum(w * (X if B is None else B @ X) @ A for w, B, A, _ in self.terms)

    @property
    def rhs(self) -> Tensor:
        return sum(w * (delta if B is None else B @ delta) @ A for w, B, A, delta in self.terms)

    def within(self, Q: Tensor) -> System:
        return System([(w, None if B is None else Q.T @ B @ Q, A, Q.T @ delta) for w, B, A, delta in self.terms])

    def damped(self, factor: float, towards: Tensor) -> System:
        """Add a start as one more expert, with a multiple of the mean diagonal of the sum in every direction."""
        diagonal = sum(w * A.diagonal().mean() * (1 if B is None else B.diagonal().mean()) for w, B, A, _ in self.terms)
        return System([*self.terms, (factor * diagonal, None, torch.eye(towards.shape[1]).double(), towards)])

    @property
    def metric(self) -> Tensor:
        """The inputs' side of the curvature, by which a result is cut."""
        return sum(w * A * (len(delta) if B is None else B.trace()) for w, B, A, delta in self.terms)

    def steps(self, X: Tensor, count: int) -> Tensor:
        """Return the iterate of the textbook's conjugate gradient."""
        R = self.rhs - self.apply(X)
        P = R
        for _ in range(count):
            AP = self.apply(P)
            alpha = (R * R).sum() / (P * AP).sum()
            X, before, R = X + alpha * P, (R * R).sum(), R - alpha * AP
            P = R + (R * R).sum() / before * P
        return X


def conditioned(gram: Tensor, options: Mapping[str, Any]) -> Tensor:
    factor = options.get("off_diagonal", 0.9 if options["method"] == "regmean" else 1)
    gram = factor * gram + (1 - factor) * torch.diag(gram.diagonal())
    size = {"trace": gram.trace() / len(gram), "frobenius": gram.norm(), "none": 1.0}
    default = "trace" if options.get("curvature") == "task_vector" else "none"
    return gram / (size[options.get("normalization", default)] or 1.0)


def system_of(made: Case, key: str, weights: Sequence[float], options: Mapping[str, Any], turned: bool) -> System:
    """Return the system of one weight from the experts' statistics, or from their task vectors."""
    terms = []
    for folder, weight, changes in zip(made.experts, weights, made.deltas, strict=True):
        delta = changes[key].T if turned else changes[key]
        if options.get("curvature") == "task_vector":
            terms.append((weight, None, conditioned(delta.T @ delta, options), delta))
            continue
        found, module = Statistics.load(Path(folder) / "statistics.safetensors"), key.removesuffix(".weight")
        source, count = found.aliases.get(module, module), found.tokens[module]
        A = conditioned(found.tensor(f"{source}.input_gram").double() / count, options)
        B = conditioned(found.tensor(f"{module}.output_gram").double() / count, options)
        gram = options["method"] == "regmean" or options.get("curvature") == "gram"
        terms.append((weight, None if gram else B, A, delta))
    return System(terms)


def span(deltas: Sequence[Tensor]) -> Tensor:
    """Return an orthonormal basis of the columns of all deltas, which their B factors span."""
    U, S, _ = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)
    return U[:, 1e-10 * S[0] < S]


def by_hand(system: System, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the merge that the options ask for, and the metric of its cut."""
    deltas, weights = [term[-1] for term in system.terms], torch.tensor([float(term[0]) for term in system.terms])
    arithmetic = options.get("initialization") == "task_arithmetic"
    factors = weights * options["scale"] if arithmetic else weights / weights.sum()
    start = sum(float(f) * delta for f, delta in zip(factors.double(), deltas, strict=True))
    system = system.damped(options.get("damping", 1.0 if options.get("curvature") == "task_vector" else 0), start)
    if "iterations" not in options:
        operator = system.apply(torch.eye(len(system.metric)).double())
        scale = operator.diagonal().rsqrt()
        smallest = torch.linalg.eigvalsh(operator * torch.outer(scale, scale))[0]
        assert smallest > len(operator) * torch.finfo(torch.float32).eps  # no direction is unseen
        return start + torch.linalg.solve(operator, system.rhs - system.apply(start), left=False), system.metric
    if options.get("subspace") == "factors":
        Q = span(deltas)
        small = system.within(Q)
        return Q @ small.steps(Q.T @ start, options["iterations"]), small.metric
    return system.steps(start, options["iterations"]), system.metric


def solved(made: Case, records: Mapping[str, TensorRecord]) -> Iterator[tuple[str, TensorRecord, bool]]:
    """Go through the solved tensors: name in the model, record, whether it is stored ``[in, out]``."""
    find = in_model(made)
    transposed = describe(json.loads((Path(made.base) / "config.json").read_text())).transposed
    found = [(find(key), record, key in transposed) for key, record in records.items() if record.action == "solve"]
    assert found
    return iter(found)


@pytest.mark.parametrize(("family", "title"), crossed(MEASURED, CURVED))
def test_a_matched_adapter_is_the_dense_solution(measured, title, family, tmp_path):
    made, options = measured(family), CURVED[title]
    records = write(made.entries(WEIGHTS), tmp_path / "merged", base=made.base, **options, rank=10_000)
    got = made.changes(made.adapted(tmp_path / "merged"))
    want = {}
    for key, record, turned in solved(made, records):
        value, _ = by_hand(system_of(made, key, WEIGHTS, options, turned), options)
        want[key] = value.T if turned else value
        assert record.truncation < 1e-6
        assert record.iterations == options.get("iterations", 0)
        assert record.solution_norm == pytest.approx(float(value.norm()), rel=1e-6)
    assert_near({key: got[key] for key in want}, want, 1e-6)
    assert not any(value.any() for key, value in got.items() if key not in want)


@pytest.mark.parametrize(("family", "title"), crossed(MEASURED, CURVED))
def test_the_cut_is_the_best_one_in_the_norm_of_the_curvature(measured, title, family, tmp_path):
    """In the norm tr(X G Xᵀ) that is the cut of the singular values of X G^½."""
    made, options = measured(family), CURVED[title]
    records = write(made.entries(WEIGHTS), tmp_path / "merged", base=made.base, **options, rank=2)
    got, want, errors = made.changes(made.adapted(tmp_path / "merged")), {}, []
    for key, record, turned in solved(made, records):
        X, G = by_hand(system_of(made, key, WEIGHTS, options, turned), options)
        values, vectors = torch.linalg.eigh(G)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        U, S, _ = torch.linalg.svd(X @ root, full_matrices=False)
        best = U[:, :2] @ U[:, :2].T @ X
        want[key] = best.T if turned else best
        errors.append(float(S[2:].norm() / S.norm()))
        assert record.rank == 2
        assert record.weighted_truncation == pytest.approx(errors[-1], rel=1e-5, abs=1e-6)
        assert record.truncation == pytest.approx(float((X - best).norm() / X.norm()), rel=1e-5, abs=1e-6)
    assert_near({key: got[key] for key in want}, want, 1e-5)
    assert max(errors) > 0.01


@pytest.mark.parametrize("family", MEASURED)
@pytest.mark.parametrize("count", [2, 3])
def test_kfac_within_the_factors_is_the_galerkin_solution(measured, family, count, tmp_path):
    """It lies in the span of the B factors, and its residual in the whole space is orthogonal to that span."""
    made = measured(family)
    options = MATS | {"subspace": "factors"}
    how = {"solver": "exact"} if count == 2 else {"iterations": 3000, "preconditioner": "kronecker"}
    part = Case(made.root, made.class_name, made.before, made.deltas[:count])
    weights = WEIGHTS[:count]
    records = write(part.entries(weights), tmp_path / "merged", base=part.base, **options, **how)
    got = part.changes(part.adapted(tmp_path / "merged"))
    outsides = []
    for key, record, turned in solved(part, records):
        system = system_of(part, key, weights, options, turned)
        X, Q = got[key].T if turned else got[key], span([term[-1] for term in system.terms])
        assert (X - Q @ (Q.T @ X)).norm() < 1e-12 * X.norm()
        residual = system.rhs - system.apply(X)
        assert (Q.T @ residual).norm() < 1e-5 * (Q.T @ system.rhs).norm()  # statistics are stored in float32
        outsides.append(float(residual.norm() / system.rhs.norm()))
        assert record.outside == pytest.approx(outsides[-1], rel=1e-5)
        assert record.truncation == 0
        assert record.rank == Q.shape[1]
    assert max(outsides) > 0.01


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("title", ["task vectors", "task vectors, their diagonal more", "RegMean"])
def test_the_full_merge_with_the_same_options_is_the_same_model(measured, title, family, tmp_path):
    made, options = measured(family), CURVED[title]
    write(made.entries(WEIGHTS), tmp_path / "merged", base=made.base, **options)
    full = mats_hub.merge(made.entries(WEIGHTS), base=made.base, format="full", **options)
    theirs = full.load("e0" if family == "bert" else None, dtype="float64").state_dict()
    assert_near(made.changes(made.adapted(tmp_path / "merged")), minus(theirs, made.before), 1e-6)


@pytest.mark.parametrize("name", ["stacked, all linear modules", "stacked, one each"])
def test_stacked_factors_are_merged_into_experts_that_are_stored_one_by_one(case, name, tmp_path):
    made = case(name)
    full = mats_hub.merge(made.experts, base=made.base, method="task_arithmetic", scale=0.6, format="full")
    assert any(".experts.2.w3." in record.key for record in full.report.tensors)
    theirs = models.state(base_model(full.folder, made.class_name))
    assert_near(minus(theirs, made.before), made.dense([0.6] * len(made.deltas)), 1e-12)


@pytest.mark.parametrize(("method", "options"), [("ties", {"density": 0.5}), ("dare", {"density": 0.7}), ("mats", {})])
def test_the_card_tells_what_a_cut_leaves_out(measured, method, options):
    made = measured("llama")
    merged = mats_hub.merge(made.experts, base=made.base, method=method, rank=1, **options)
    worst = max(record.truncation or 0 for record in merged.report.tensors)
    assert 0.01 < worst < 1
    assert "cuts off at most" in (merged.folder / "README.md").read_text()


# --- the base


def bare(made: Case, folder: Path) -> str:
    """Copy a base without its weights."""
    folder.mkdir()
    shutil.copy(Path(made.base) / "config.json", folder)
    return str(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "Conv1D", "embedding", "rank pattern", "Conv2d", "bare matrices", "stacked, both"),
        *("stacked, transposed", "heads of their own", "tied embedding", "embedding that PEFT saves as well"),
    ],
)
def test_the_config_of_the_base_is_enough(case, name, tmp_path):
    made = case(name)
    base = bare(made, tmp_path / "base")
    options = {"method": "average", "allow_other_base": True}
    write(made.experts, tmp_path / "merged", base=base, **options)
    want = made.dense([1 / len(made.deltas)] * len(made.deltas))
    assert_near(made.changes(made.adapted(tmp_path / "merged")), want, 1e-10)
    with pytest.raises(PlanError, match=r"has no model\.safetensors"):
        mats_hub.merge(made.experts, base=base, format="full", **options)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("pooler, whole in one", r"pooler\.dense\.(bias|weight)"),
        ("all biases", r"[\w.]+\.bias"),
        ("embedding, whole in another", r"model\.embed_tokens\.weight"),
    ],
)
def test_tensors_held_whole_need_the_weights_of_the_base(case, name, tensor, tmp_path):
    made = case(name)
    base = bare(made, tmp_path / "base")
    told = rf"some adapters hold '{tensor}' whole, so that its change needs the base's weights, but: .*has no model"
    with pytest.raises(PlanError, match=told):
        mats_hub.merge(made.experts, base=base, method="average", allow_other_base=True)


def test_a_damaged_base_is_not_noticed_where_it_is_not_read(measured, tmp_path):
    made = measured("gpt2")
    shutil.copytree(made.base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:length] + b"\xff" * (len(data) - length))  # NaN everywhere
    options = {"base": str(tmp_path / "base"), "method": "regmean", "allow_other_base": True}
    mats_hub.merge(made.experts, **options)
    with pytest.raises(NumericalError, match="the base has a NaN"):
        mats_hub.merge(made.experts, format="full", **options)


def test_an_adapter_of_another_commit_of_the_base_is_refused(hub, case, tmp_path):
    made = case("plain")
    token = hub.add_user("alice")

    def files(folder: str, **changes: Any) -> dict[str, bytes]:
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        if changes:
            config = json.loads(found["adapter_config.json"])
            found["adapter_config.json"] = json.dumps(config | changes).encode()
        return found

    first = hub.create("alice/base", files(made.base))
    second = hub.commit("alice/base", {"notes.txt": b"trained longer"})
    assert first != second
    revisions = {"old": first, "new": second, "branch": "main", "silent": None}
    for index, (name, revision) in enumerate(revisions.items()):
        expert = made.experts[index % len(made.experts)]
        hub.create(f"alice/{name}", files(expert, base_model_name_or_path="alice/base", revision=revision))
    told = rf"'alice/old' was trained on 'alice/base@{first}' \(commit {first[:12]}\).* base is commit {second[:12]}"
    for base in ("alice/base", f"alice/base@{second}"):
        with pytest.raises(PlanError, match=f"(?s){told}") as caught:
            mats_hub.merge(["alice/new", "alice/old"], base=base, method="average", token=token)
        assert len(caught.value.problems) == 1
    told = rf"'alice/new' was trained on 'alice/base@{second}'.* base is commit {first[:12]}"
    with pytest.raises(PlanError, match=f"(?s){told}"):  # the base of the first adapter is the merge's
        mats_hub.merge(["alice/old", "alice/new"], method="average", token=token)
    with pytest.raises(PlanError, match=r"'alice/branch' was trained on 'alice/base@main'"):
        mats_hub.merge(["alice/old", "alice/branch"], base=f"alice/base@{first}", method="average", token=token)
    for names in (["new", "branch", "silent"], ["old", "silent"]):
        merged = mats_hub.merge([f"alice/{name}" for name in names], method="average", token=token)
        config = json.loads((merged.folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "alice/base"
        assert config["revision"] == (second if "new" in names else first)
    loose = {"base": "alice/base", "method": "average", "allow_other_base": True}
    assert mats_hub.merge(["alice/new", "alice/old"], token=token, **loose).report.base["commit"] == second


# --- the folder


@pytest.mark.parametrize("family", MEASURED)
def test_the_folder_is_an_adapter_repository(measured, family):
    made = measured(family)
    merged = mats_hub.merge(made.experts, base=made.base, method="average", dtype="bfloat16")
    assert not (merged.folder / "config.json").exists()
    stored = load_file(merged.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((merged.folder / "adapter_config.json").read_text())
    assert config["task_type"] == MEASURED[family][2]["task_type"] if family != "bert" else not config["task_type"]
    assert str(made.root) not in json.dumps(config)
    text = (merged.folder / "README.md").read_text()
    assert validate_card(text) == ([], [])
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    again = mats_hub.merge([str(merged.folder)], base=made.base, method="average", allow_other_base=True)
    assert again.report.experts[0]["kind"] == "LoRA adapter (rank 7)"


def test_what_is_no_adapter_is_refused(measured):
    made = measured("llama")
    with pytest.raises(MatsError, match=r"output format 'adapter' merges .* but .*base' is a full checkpoint"):
        mats_hub.merge([*made.experts, made.base], base=made.base, method="average", format="adapter")
    for options in ({}, {"format": "full"}):
        with pytest.raises(MatsError, match="rank"):
            mats_hub.merge([made.base, *made.experts], base=made.base, method="average", rank=3, **options)


def test_factors_of_one_of_two_tied_weights_do_not_go_into_a_full_checkpoint(tmp_path):
    models.tiny_gpt2(tmp_path / "base")
    for seed in (1, 2):
        models.lora_adapter(tmp_path / "base", tmp_path / f"e{seed}", seed=seed, **CAUSAL | on("c_attn", "lm_head"))
    experts = [str(tmp_path / f"e{seed}") for seed in (1, 2)]
    with pytest.raises(
        PlanError, match=r"'lm_head\.weight', which .*base' stores once with 'transformer\.wte\.weight'"
    ):
        mats_hub.merge(experts, base=str(tmp_path / "base"), method="average", format="full")
    assert mats_hub.merge(experts, base=str(tmp_path / "base"), method="average").report.tensors
