"""Statistics against direct computations with torch.autograd, one example at a time, and the file they are kept in."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
from cases import crossed
from models import (
    FACTORIES,
    ia3_adapter,
    lora_adapter,
    merged_lora,
    perturbed,
    save,
    tiny_bert_body,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_images,
    tiny_t5,
    tiny_texts,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import mats_hub
from mats_hub.cli import main
from mats_hub.curvature import Dense, Diagonal, Gram, Kronecker, LowRank, written_out
from mats_hub.errors import (
    CheckpointError,
    NumericalError,
    PlanError,
    RecipeError,
    SourceError,
    StatisticsError,
    StatisticsMismatch,
)
from mats_hub.recipe import Curvature as CurvatureOptions
from mats_hub.source import open_source
from mats_hub.statistics import STATISTICS_FILE, Provenance, Statistics, Sums, compute_statistics, passes
from mats_hub.statistics import measure as measuring
from mats_hub.statistics.collect import collect, survey
from mats_hub.statistics.dataset import Columns
from mats_hub.statistics.sketch import Sketch, nystrom
from mats_hub.statistics.tasks import infer_task, open_task
from mats_hub.statistics.watch import Watch, linear_modules, transposed_modules

EXAMPLES = 7
ALL = ("gram", "kfac", "fisher", "block_fisher")


def examples_of(family: str, count: int = EXAMPLES) -> datasets.Dataset:
    """Return a small data set of the family's task, its texts of different lengths."""
    if family == "vit":
        return datasets.Dataset.from_dict({"image": tiny_images(count), "label": [i % 3 for i in range(count)]})
    rows: dict[str, Any] = {"text": tiny_texts(count, seed=1)}
    if family == "bert":
        rows["label"] = [i % 2 for i in range(count)]
    if family == "t5":  # one target is as long as its text, the others longer or shorter
        rows["target"] = [rows["text"][0], *tiny_texts(count - 1, seed=2, longest=7)]
    return datasets.Dataset.from_dict(rows)


def task_data(folder: Path, model: Any, dataset: Any, columns: Columns = Columns(), **options: Any) -> Any:  # noqa: B008
    return open_task(type(model).__name__, model.config, [open_source(folder)], dataset, columns, **options)


def measured(case: Any, kinds: Any = ALL, size: int = 1, rows: Any = None, extra: int = 0) -> Sums:
    data = case.data if rows is None else dataclasses.replace(case.data, dataset=case.data.dataset.select(rows))
    batches = (over_padded(batch, extra) for batch in data.batches(size)) if extra else data.batches(size)
    return collect(case.model, batches, kinds, data.loss, data.masks)


def over_padded(batch: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
    fill = {"labels": -100, "input_ids": 7}
    return {
        key: nn.functional.pad(value, (0, extra), value=fill.get(key, 0)) if value.dim() == 2 else value
        for key, value in batch.items()
    }


def assert_close(actual: Any, expected: Any, what: str = "", rtol: float = 1e-4, floor: float = 1e-12) -> None:
    """Compare entry by entry, with zeros allowed the rounding error of the largest entry."""
    atol = rtol * 0.1 * max(float(expected.abs().max()), floor)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )


def assert_same_sums(actual: Sums, expected: Sums) -> None:
    assert (actual.tokens, actual.aliases, actual.examples) == (expected.tokens, expected.aliases, expected.examples)
    assert actual.tensors.keys() == expected.tensors.keys()
    floor = fisher_floor(expected.tensors)
    for key, value in expected.tensors.items():
        assert_close(actual.tensors[key], value, key, floor=floor)


def fisher_floor(tensors: dict[str, Tensor]) -> float:
    """Return what counts as zero: softmax ignores a key's bias, so its squared gradient is all rounding error."""
    return 1e-8 * max((float(value.max()) for value in tensors.values()), default=1.0)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("cases")
    found = {}
    for family, factory in FACTORIES.items():
        model = factory(root / family, seed=3)
        found[family] = SimpleNamespace(
            family=family,
            folder=root / family,
            model=model,
            data=task_data(root / family, model, examples_of(family)),
        )
    for case in found.values():
        case.sums = measured(case)
    return found


@pytest.fixture(params=list(FACTORIES))
def case(request: pytest.FixtureRequest, cases: dict[str, Any]) -> Any:
    return cases[request.param]


@pytest.fixture(scope="module")
def direct(cases: dict[str, Any]) -> dict[str, Any]:
    """Compute everything with plain autograd on one unpadded example after another and the model's own loss."""
    return {family: direct_sums(case.model, case.data) for family, case in cases.items()}


def direct_sums(model: Any, data: Any) -> Any:
    modules = linear_modules(model)
    total = SimpleNamespace(input={}, output={}, fisher={}, block={}, tokens={}, losses=[])
    parameters = dict(model.named_parameters())
    for batch in data.batches(1):
        if batch.get("labels", torch.zeros(1)).dim() == 2:
            batch["labels"] = batch["labels"][batch["labels"] != -100][None]
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def seen(
            name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], module: Any, given: Any, output: Tensor
        ) -> None:
            inputs[name], outputs[name] = given[0].detach(), output

        handles = [m.register_forward_hook(partial(seen, n, inputs, outputs)) for n, m in modules.items()]
        loss = model(**batch).loss
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, [*outputs.values(), *parameters.values()], allow_unused=True)
        for name, gradient in zip(outputs, gradients, strict=False):
            x = inputs[name].reshape(-1, inputs[name].shape[-1]).double()
            g = gradient.reshape(-1, gradient.shape[-1]).double()
            total.input[name] = total.input.get(name, 0) + x.T @ x
            total.output[name] = total.output.get(name, 0) + g.T @ g
            total.tokens[name] = total.tokens.get(name, 0) + len(x)
        for (name, parameter), gradient in zip(parameters.items(), gradients[len(outputs) :], strict=True):
            squared = torch.zeros_like(parameter) if gradient is None else gradient**2
            total.fisher[name] = total.fisher.get(name, 0) + squared.double()
            if parameter.numel() == max(parameter.shape):
                g = (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1).double()
                total.block[name] = total.block.get(name, 0) + torch.outer(g, g)
        total.losses.append(loss.item())
    return total


WAYS = {
    "all at once": {"size": 16},
    "two at a time": {"size": 2},
    "another order": {"size": 3, "rows": list(reversed(range(EXAMPLES)))},
    "padded more than needed": {"size": 1, "extra": 3},
    "at once, padded more": {"size": 16, "extra": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_sums_depend_neither_on_batch_size_nor_padding_nor_order(case: Any, way: str) -> None:
    assert_same_sums(measured(case, **WAYS[way]), case.sums)


def test_sums_over_three_parts_of_the_data_add_up(case: Any) -> None:
    a, b, c = (measured(case, rows=rows, size=4) for rows in ([0, 1, 2], [3], [4, 5, 6]))
    assert_same_sums(a.merged(b).merged(c), case.sums)
    assert a.examples == 3, "adding left the parts as they were"


def test_sums_of_other_modules_are_not_added(cases: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        cases["bert"].sums.merged(cases["gpt2"].sums)
    with pytest.raises(ValueError, match="cannot be added"):
        cases["bert"].sums.merged(measured(cases["bert"], ("gram",)))


def test_grams_equal_the_inputs_and_gradients_of_every_module(case: Any, direct: dict[str, Any]) -> None:
    expected, sums = direct[case.family], case.sums
    assert expected.tokens.items() <= sums.tokens.items()
    for name in linear_modules(case.model):
        assert_close(sums.tensors[f"{sums.aliases.get(name, name)}.input_gram"], expected.input[name], name)
        assert_close(sums.tensors[f"{name}.output_gram"], expected.output[name], name)


def test_fisher_equals_squared_gradients_of_single_examples(case: Any, direct: dict[str, Any]) -> None:
    expected = direct[case.family].fisher
    assert {f"{name}.fisher" for name in expected} == {key for key in case.sums.tensors if key.endswith(".fisher")}
    for name, value in expected.items():
        assert_close(case.sums.tensors[f"{name}.fisher"], value, name, floor=fisher_floor(expected))
    assert any(value.abs().max() > 0 for value in expected.values())


def test_block_fisher_is_the_outer_products_of_single_examples_gradients_at_vectors_alone(
    case: Any, direct: dict[str, Any]
) -> None:
    expected, tensors = direct[case.family].block, case.sums.tensors
    assert {f"{name}.block_fisher" for name in expected} == {key for key in tensors if key.endswith(".block_fisher")}
    assert 0 < len(expected) < len(list(case.model.parameters()))
    floor = fisher_floor(expected)
    for name, value in expected.items():
        block = tensors[f"{name}.block_fisher"]
        assert_close(block, value, name, floor=floor)
        assert_close(block.diagonal(), tensors[f"{name}.fisher"].reshape(-1), name, floor=floor)
        assert torch.equal(block, block.T)


def test_loss_is_the_sum_of_the_models_own_over_single_examples(case: Any, direct: dict[str, Any]) -> None:
    (batch,) = case.data.batches(EXAMPLES)
    with torch.no_grad():
        assert float(case.data.loss(case.model, batch)) == pytest.approx(sum(direct[case.family].losses), rel=1e-5)
        for single, expected in zip(case.data.batches(1), direct[case.family].losses, strict=True):
            assert float(case.data.loss(case.model, single)) == pytest.approx(expected, rel=1e-5)


SHARED = {
    "bert": ("key value -> query",),
    "gpt2": (),
    "llama": ("k_proj v_proj -> q_proj", "up_proj -> gate_proj"),
    "t5": ("k v -> q",),
    "vit": ("k_proj v_proj -> q_proj",),
}


def test_modules_that_read_the_same_input_share_one_gram(case: Any) -> None:
    last = {name: name.rsplit(".", 1)[-1] for name in linear_modules(case.model)}
    expected = {}
    for rule in SHARED[case.family]:
        followers, leader = rule.split(" -> ")
        for name in last:
            if last[name] in followers.split() and "EncDec" not in name:
                expected[name] = name.removesuffix(last[name]) + leader
            elif last[name] == "v" and "EncDec" in name:  # its query reads the decoder, key and value the encoder
                expected[name] = name.removesuffix("v") + "k"
    assert case.sums.aliases == expected
    assert measured(case, ("gram",), size=4).aliases == expected, "without a backward pass as well"
    stored = {key for key in case.sums.tensors if key.endswith(".input_gram")}
    tied = {"gpt2": {"transformer.wte.as_output"}, "t5": {"shared.as_output"}}.get(case.family, set())
    convolution = {"vit.embeddings.patch_embeddings.projection"} if case.family == "vit" else set()
    own = {name for name in last if name not in expected} | tied | convolution
    assert stored == {f"{name}.input_gram" for name in own}


def test_tied_heads_and_conv1d(cases: dict[str, Any]) -> None:
    for family, tied in {"gpt2": "lm_head", "t5": "lm_head"}.items():
        assert tied not in linear_modules(cases[family].model)
    assert "lm_head" in linear_modules(cases["llama"].model)
    blocks = [
        f"transformer.h.{i}.{m}" for i in (0, 1) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert transposed_modules(cases["gpt2"].model) == blocks
    assert not any(transposed_modules(cases[family].model) for family in ("bert", "llama", "t5", "vit"))
    sums = cases["gpt2"].sums
    shapes = [tuple(sums.tensors[f"{blocks[0]}.{side}_gram"].shape) for side in ("input", "output")]
    assert shapes == [(16, 16), (48, 48)], "the Grams are those of y = W x, however W is stored"


@pytest.mark.parametrize(
    "kinds", [("gram",), ("kfac",), ("fisher",), ("block_fisher",), ("gram", "fisher")], ids="+".join
)
def test_each_kind_alone_holds_what_it_needs(case: Any, kinds: tuple[str, ...]) -> None:
    sums = measured(case, kinds, size=4)
    ends = {key.rsplit(".", 1)[-1] for key in sums.tensors}
    wanted = {"gram": {"input_gram", "input_counts", "input_squares"}}
    wanted["kfac"] = {"output_gram", "gradient_squares"} | wanted["gram"]
    wanted |= {kind: {kind} for kind in ("fisher", "block_fisher")}
    assert ends <= set().union(*(wanted[kind] for kind in kinds))
    assert all(ends & wanted[kind] for kind in kinds)
    for key, value in sums.tensors.items():
        assert_close(value, case.sums.tensors[key], key, floor=fisher_floor(sums.tensors))
    assert all(value.dtype == torch.float64 for value in sums.tensors.values()), (
        "so that the order of adding is the same"
    )


def test_gram_needs_no_labels(cases: dict[str, Any]) -> None:
    for family in ("bert", "vit"):
        case = cases[family]
        data = task_data(case.folder, case.model, examples_of(family).remove_columns("label"), needs_labels=False)
        sums = collect(case.model, data.batches(3), ("gram",), data.loss, data.masks)
        assert_close(sums.tensors["classifier.input_gram"], case.sums.tensors["classifier.input_gram"])


def test_texts_longer_than_the_model_are_cut(cases: dict[str, Any]) -> None:
    case = cases["gpt2"]
    dataset = datasets.Dataset.from_dict({"text": tiny_texts(3, shortest=40, longest=50)})
    for options, length in (({}, 32), ({"max_length": 5}, 5)):
        data = task_data(case.folder, case.model, dataset, **options)
        assert [batch["input_ids"].shape for batch in data.batches(3)] == [(3, length)]


def test_text_without_tokens_counts_nothing(cases: dict[str, Any]) -> None:
    case = cases["gpt2"]
    texts = list(case.data.dataset["text"])
    data = task_data(case.folder, case.model, datasets.Dataset.from_dict({"text": [texts[0], "", *texts[1:]]}))
    for size in (1, 16):
        sums = collect(case.model, data.batches(size), ALL, data.loss, data.masks)
        assert_same_sums(sums, case.sums)


def test_encoder_and_decoder_are_masked_apart_when_equally_long(cases: dict[str, Any]) -> None:
    case = cases["t5"]
    rows = {
        "text": ["so it was", "they liked the very warm song then"],
        "target": ["but we hated the very slow plot", "it"],
    }
    data = task_data(case.folder, case.model, datasets.Dataset.from_dict(rows))
    both = SimpleNamespace(model=case.model, data=data)
    assert_same_sums(measured(both, size=2), measured(both, size=1))


def test_sentence_pairs(cases: dict[str, Any]) -> None:
    case = cases["bert"]
    rows = {"premise": tiny_texts(4, 5), "hypothesis": tiny_texts(4, 6), "label": [0, 1, 1, 0]}
    data = task_data(case.folder, case.model, datasets.Dataset.from_dict(rows))
    assert data.columns == Columns(text=("premise", "hypothesis"), label="label")
    (batch,) = data.batches(4)
    assert batch["token_type_ids"].max() == 1
    pair = SimpleNamespace(model=case.model, data=data)
    assert_same_sums(measured(pair, size=4), measured(pair, size=1))


def test_model_is_left_as_it_was(cases: dict[str, Any]) -> None:
    model = tiny_bert_classifier(seed=3)
    model.train()
    model.bert.encoder.layer[0].eval()  # as those freeze layers who fine-tune only a part
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.0" not in name)
    before = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    data = cases["bert"].data

    def check() -> None:
        assert {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == before
        assert {n: p.requires_grad for n, p in model.named_parameters()} == required
        assert all(p.grad is None for p in model.parameters())

    assert_same_sums(collect(model, data.batches(4), ALL, data.loss, data.masks), cases["bert"].sums)
    check()
    with pytest.raises(ZeroDivisionError):
        collect(model, data.batches(4), ALL, lambda model, batch: model(**batch).loss / (1 // 0), data.masks)
    check()


@pytest.mark.parametrize("kinds", [("gram",), ("kfac",), ("fisher",)], ids="+".join)
def test_nan_in_a_weight_is_an_error(cases: dict[str, Any], kinds: tuple[str, ...]) -> None:
    model = tiny_bert_classifier(seed=3)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    data = cases["bert"].data
    with pytest.raises(NumericalError, match=r"'bert\.\S+' are not finite"):
        collect(model, data.batches(4), kinds, data.loss, data.masks)


def test_no_examples_is_an_error(cases: dict[str, Any]) -> None:
    with pytest.raises(StatisticsError, match="no example"):
        measured(cases["bert"], rows=[])


# --- what theory says


class OneLayer(nn.Module):
    """A linear model with zero weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_kfac_is_the_exact_fisher_when_inputs_and_gradients_are_independent() -> None:
    # With zero weights the gradient softmax(0) − onehot(y) depends on the label alone; the data are every input with
    # every label, so inputs and gradients are independent and E[(g xᵀ)(g xᵀ)ᵀ] = E[g gᵀ] ⊗ E[x xᵀ].
    inputs, labels = 5, 3
    points = torch.randn(4, inputs, generator=torch.Generator().manual_seed(0)) + 0.5
    pairs = list(itertools.product(range(len(points)), range(labels)))
    batch = {"x": points[[i for i, _ in pairs]], "labels": torch.tensor([y for _, y in pairs])}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")

    sums = collect(OneLayer(inputs, labels), [batch], ("kfac", "fisher"), loss)
    statistics = Statistics(Provenance(("kfac", "fisher"), examples=sums.examples), sums)
    gradients = torch.stack(
        [torch.outer(torch.full((labels,), 1 / labels) - torch.eye(labels)[y], points[i]).reshape(-1) for i, y in pairs]
    )
    exact = gradients.T @ gradients / len(pairs)
    kfac = statistics.curvature("linear.weight", CurvatureOptions(kind="kfac"))
    assert isinstance(kfac, Kronecker)
    torch.testing.assert_close(torch.kron(kfac.output, kfac.input), exact, rtol=1e-5, atol=1e-6)
    value = torch.randn(labels, inputs, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kfac.matvec(value).reshape(-1), exact @ value.reshape(-1), rtol=1e-5, atol=1e-6)
    fisher = statistics.curvature("linear.weight", CurvatureOptions(kind="fisher"))
    torch.testing.assert_close(fisher.diagonal(value.shape).reshape(-1), exact.diagonal(), rtol=1e-5, atol=1e-7)


def test_gram_is_the_hessian_of_matching_outputs(cases: dict[str, Any]) -> None:
    # RegMean: mean over tokens of |V x|² = <V, V A>.
    case = cases["llama"]
    name = "model.layers.1.mlp.down_proj"
    statistics = Statistics(Provenance(ALL, examples=EXAMPLES), case.sums)
    gram = statistics.curvature(f"{name}.weight", CurvatureOptions(kind="gram"))
    value = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    moved, count = [], 0

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        moved.append(float((inputs[0] @ value.T).square().sum()))

    handle = case.model.get_submodule(name).register_forward_hook(seen)
    with torch.no_grad():
        for batch in case.data.batches(1):
            case.model(**batch)
            count += batch["input_ids"].numel()
    handle.remove()
    assert float((value * gram.matvec(value)).sum()) == pytest.approx(sum(moved) / count, rel=1e-4)


# --- what is refused


def bert_rows(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ["the film was good", "it felt slow"], "label": [0, 1]} | columns)


REFUSED: dict[str, tuple[dict[str, Any], Any, Columns, tuple[str, ...]]] = {
    "label too large": ({}, bert_rows(label=[0, 2]), Columns(), ("label 2", "'label'", "2 labels", "0 to 1")),
    "label negative": ({}, bert_rows(label=[-1, 1]), Columns(), ("label -1", "2 labels")),
    "label a fraction": ({}, bert_rows(label=[0.5, 1.0]), Columns(), ("label 0.5", "2 labels")),
    "label missing": ({}, bert_rows(label=[1, None]), Columns(), ("label None", "2 labels")),
    "label of another name": ({}, bert_rows(label=["LABEL_0", "good"]), Columns(), ("'good'", "LABEL_0, LABEL_1")),
    "unknown column": ({}, bert_rows(), Columns(text=("txt",)), ("'txt'", "'text'?", "text, label")),
    "unknown label column": ({}, bert_rows(), Columns(label="labels"), ("'labels'", "text, label")),
    "no text column": (
        {},
        bert_rows().rename_column("text", "words"),
        Columns(),
        ("the text", "--text", "words, label"),
    ),
    "no label column": ({}, bert_rows().rename_column("label", "y"), Columns(), ("the label", "--label", "text, y")),
    "unknown task": ({"task": "text-clasification"}, bert_rows(), Columns(), ("'text-classification'?", "causal-lm")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_do_not_fit_are_refused(cases: dict[str, Any], name: str) -> None:
    options, dataset, columns, told = REFUSED[name]
    case = cases["bert"]
    with pytest.raises(StatisticsError) as caught:
        list(task_data(case.folder, case.model, dataset, columns, **options).batches(1))
    for text in told:
        assert text in str(caught.value)
    assert "{" not in str(caught.value)


def test_labels_by_name_and_by_truth_value(cases: dict[str, Any]) -> None:
    case = cases["bert"]
    for labels in (["LABEL_0", "LABEL_1"], [False, True]):
        data = task_data(case.folder, case.model, bert_rows(label=labels))
        (batch,) = data.batches(2)
        assert batch["labels"].tolist() == [0, 1]
        assert batch["labels"].dtype == torch.int64


def test_seq2seq_needs_its_target_for_grams_too(cases: dict[str, Any]) -> None:
    case = cases["t5"]
    dataset = case.data.dataset.remove_columns("target")
    with pytest.raises(StatisticsError, match="--target"):
        task_data(case.folder, case.model, dataset, needs_labels=False)


def test_translations_are_read_from_the_fields_of_a_column(cases: dict[str, Any]) -> None:
    case = cases["t5"]
    pairs = case.data.dataset
    inside = datasets.Dataset.from_list(
        [{"translation": {"en": row["text"], "de": row["target"]}} for row in pairs.select_columns(["text", "target"])]
    )
    with pytest.raises(StatisticsError, match=r"--text\. The data set has: translation\.en, translation\.de"):
        task_data(case.folder, case.model, inside)
    named = Columns(text=("translation.en",), target="translation.de")
    found, plain = (
        list(task_data(case.folder, case.model, rows, columns).batches(2))
        for rows, columns in ((inside, named), (pairs, Columns()))
    )
    assert len(found) == len(plain) > 1
    for one, other in zip(found, plain, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    with pytest.raises(StatisticsError, match=r"'translation\.fr'. Did you mean"):
        task_data(case.folder, case.model, inside, Columns(text=("translation.en",), target="translation.fr"))


@pytest.mark.parametrize(
    ("table", "kinds"),
    [
        ("AUDIO_CLASSIFICATION", ["audio-classification"]),
        ("SEQUENCE_CLASSIFICATION", ["text-classification"]),
        ("TOKEN_CLASSIFICATION", ["token-classification"]),
        ("QUESTION_ANSWERING", ["question-answering"]),
        ("MULTIPLE_CHOICE", ["multiple-choice"]),
        ("CAUSAL_LM", ["causal-lm", "image-text-to-text", "seq2seq"]),
        ("SEQ_TO_SEQ_CAUSAL_LM", ["seq2seq", "speech-recognition", "image-text-to-text"]),
        ("SPEECH_SEQ_2_SEQ", ["speech-recognition"]),
        ("CTC", ["ctc"]),
        ("ZERO_SHOT_IMAGE_CLASSIFICATION", ["zero-shot-image-classification"]),
    ],
)
def test_every_class_of_transformers_tables_has_its_task(table: str, kinds: list[str]) -> None:
    names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
    found = {name: infer_task(name).name for name in names}
    assert found
    assert not {name: kind for name, kind in found.items() if kind not in kinds}


def test_model_without_a_task_or_tokenizer_is_refused(cases: dict[str, Any], tmp_path: Path) -> None:
    other = transformers.BertForNextSentencePrediction(tiny_bert_body(tmp_path / "body").config)
    told = r"task of a BertForNextSentencePrediction; name one of: audio-classification, text-classification"
    with pytest.raises(StatisticsError, match=told):
        task_data(tmp_path / "body", other, bert_rows())
    cases["bert"].model.save_pretrained(tmp_path / "bare")
    with pytest.raises(StatisticsError, match=r"bare.*has a tokenizer_config\.json"):
        task_data(tmp_path / "bare", cases["bert"].model, bert_rows())
    cases["vit"].model.save_pretrained(tmp_path / "bare_vit")
    with pytest.raises(StatisticsError, match=r"preprocessor_config\.json"):
        task_data(tmp_path / "bare_vit", cases["vit"].model, examples_of("vit"))


# --- the file


@pytest.fixture
def statistics(cases: dict[str, Any]) -> Statistics:
    case = cases["gpt2"]
    transposed = tuple(transposed_modules(case.model))
    origin = {"model": "someone/model@0123", "fingerprint": "f" * 64, "columns": {"text": ["text"]}}
    return Statistics(Provenance(ALL, examples=EXAMPLES, transposed=transposed, **origin), case.sums)


@pytest.mark.parametrize("family", FACTORIES)
def test_file_round_trip(cases: dict[str, Any], tmp_path: Path, family: str) -> None:
    case = cases[family]
    provenance = Provenance(
        ALL,
        model="someone/modèle@0123",
        fingerprint="ab" * 32,
        columns={"text": ["text"]},
        examples=EXAMPLES,
        transposed=tuple(transposed_modules(case.model)),
        max_length=32,
    )
    sums = dataclasses.replace(case.sums, tensors=dict(case.sums.tensors))
    sums.narrow()
    written = Statistics(provenance, sums)
    path = written.save(tmp_path / "new" / "folder" / STATISTICS_FILE)
    assert written.path == path
    assert [p.name for p in path.parent.iterdir()] == [STATISTICS_FILE], "nothing partial is left"
    read = Statistics.load(path)
    assert (read.tokens, read.aliases) == (case.sums.tokens, case.sums.aliases)
    assert dataclasses.replace(read.provenance, columns={}) == dataclasses.replace(provenance, columns={})
    assert read.provenance.columns == provenance.columns
    assert set(read.keys()) == set(case.sums.tensors)
    for key, value in sums.tensors.items():
        assert torch.equal(read.tensor(key), value)
        assert read.shape(key) == tuple(value.shape) == written.shape(key)
    assert [read.covers(kind) for kind in ALL] == [written.covers(kind) for kind in ALL]
    again = Statistics.load(read.save(tmp_path / "again.safetensors"))
    assert again.provenance == read.provenance
    assert all(torch.equal(again.tensor(key), value) for key, value in sums.tensors.items())


def test_statistics_of_nothing_are_a_file_too(tmp_path: Path) -> None:
    path = Statistics(Provenance(kinds=("gram",)), Sums()).save(tmp_path / STATISTICS_FILE)
    assert list(Statistics.load(path).keys()) == []


def test_the_same_statistics_are_the_same_bytes(statistics: Statistics, tmp_path: Path) -> None:
    assert len({statistics.save(tmp_path / f"{number}.safetensors").read_bytes() for number in range(12)}) == 1


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file_is_refused(statistics: Statistics, tmp_path: Path, kept: int) -> None:
    path = statistics.save(tmp_path / STATISTICS_FILE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut short|not a safetensors file"):
        Statistics.load(path)


def with_content(content: Any) -> dict[str, str]:
    return {"mats_statistics": content if isinstance(content, str) else json.dumps(content)}


PROVENANCE = dataclasses.asdict(Provenance(("gram",)))
FOREIGN = {
    "no metadata": (None, "holds no statistics"),
    "metadata of others": ({"format": "pt"}, "holds no statistics"),
    "not JSON": (with_content("{"), "holds no statistics"),
    "not an object": (with_content([]), "holds no statistics"),
    "no provenance": (with_content({"tokens": {}, "aliases": {}}), "holds no statistics"),
    "tokens a list": (with_content({"provenance": PROVENANCE, "tokens": [], "aliases": {}}), "holds no statistics"),
    "newer": (
        with_content({"provenance": PROVENANCE | {"format_version": 2}, "tokens": {}, "aliases": {}}),
        r"format 2; this version reads up to 1.*[Uu]pdate",
    ),
    "newer, with other fields": (
        with_content({"provenance": {"format_version": 3, "sorts": []}, "rows": {}}),
        r"format 3; this version reads up to 1",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_and_of_newer_formats_are_refused(tmp_path: Path, name: str) -> None:
    metadata, told = FOREIGN[name]
    path = tmp_path / STATISTICS_FILE
    save_file({"a.input_gram": torch.eye(2)}, path, metadata=metadata)
    with pytest.raises(StatisticsError, match=told) as caught:
        Statistics.load(path)
    assert STATISTICS_FILE in str(caught.value)


def test_fields_of_later_versions_are_passed_over_and_a_missing_file_is_named(tmp_path: Path) -> None:
    content = {"provenance": PROVENANCE | {"weather": "fair"}, "tokens": {"a": 3}, "aliases": {}}
    path = tmp_path / STATISTICS_FILE
    save_file({"a.input_gram": torch.eye(2)}, path, metadata=with_content(content))
    assert Statistics.load(path).tokens == {"a": 3}
    with pytest.raises(StatisticsError, match=r"elsewhere\.safetensors.*mats-hub statistics"):
        Statistics.load(tmp_path / "elsewhere.safetensors")


def test_check_expert_refuses_other_weights(statistics: Statistics) -> None:
    statistics.check_expert("mine", "f" * 64, "someone/model@0123")
    with pytest.raises(StatisticsMismatch) as caught:
        statistics.check_expert("mine", "e" * 64, "someone/other@4567")
    for text in ("'mine'", "someone/model@0123", "someone/other@4567", "f" * 12, "e" * 12, "measure again"):
        assert text in str(caught.value)


def test_covers(cases: dict[str, Any], statistics: Statistics) -> None:
    model = cases["gpt2"].model
    assert statistics.covers("fisher") == {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes = {f"{name}.weight": tuple(model.get_submodule(name).weight.T.shape) for name in linear_modules(model)}
    assert statistics.covers("kfac", ("linear",)) == shapes
    assert statistics.covers("gram", ("linear",)) == {name: (0, inner) for name, (_, inner) in shapes.items()}
    assert (
        set(statistics.covers("kfac"))
        == set(statistics.covers("gram"))
        == {name for name, _ in model.named_parameters()}
    )
    assert statistics.covers("kfac")["transformer.wte.weight"] == (36, 16), "looked up and, as the head, multiplied by"
    assert statistics.covers("gram", ("embedding",)) == {"transformer.wpe.weight": (0, 32)}
    assert statistics.is_transposed("transformer.h.0.attn.c_attn.weight")
    assert not statistics.is_transposed("transformer.wte.weight")
    grams = Statistics(Provenance(("gram",)), measured(cases["bert"], ("gram",), size=4))
    weights = {f"{name}.weight" for name in linear_modules(cases["bert"].model)}
    assert (set(grams.covers("gram", ("linear",))), grams.covers("kfac"), grams.covers("fisher")) == (weights, {}, {})


def shrunk(matrix: Tensor, factor: float) -> Tensor:
    return matrix * (factor + (1 - factor) * torch.eye(len(matrix)))


SIZES = {
    "none": lambda m: 1.0,
    "trace": lambda m: m.diagonal().mean() if m.dim() == 2 and m.shape[0] == m.shape[1] else m.mean(),
    "frobenius": lambda m: m.square().sum().sqrt(),
}


@pytest.mark.parametrize("normalization", SIZES)
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("module", ["query", "key", "value"])
def test_curvatures_of_grams(cases: dict[str, Any], normalization: str, off_diagonal: float, module: str) -> None:
    sums = cases["bert"].sums
    statistics = Statistics(Provenance(ALL, examples=EXAMPLES), sums)
    parent = "bert.encoder.layer.1.attention.self"
    count = sums.tokens[f"{parent}.{module}"]
    inner = shrunk(sums.tensors[f"{parent}.query.input_gram"] / count, off_diagonal)
    outer = shrunk(sums.tensors[f"{parent}.{module}.output_gram"] / count, off_diagonal)
    inner, outer = (matrix / SIZES[normalization](matrix) for matrix in (inner, outer))
    options = {"off_diagonal": off_diagonal, "normalization": normalization}
    gram = statistics.curvature(f"{parent}.{module}.weight", CurvatureOptions(kind="gram", **options))
    assert isinstance(gram, Gram)
    assert_close(gram.matrix, inner, rtol=1e-5)
    kfac = statistics.curvature(f"{parent}.{module}.weight", CurvatureOptions(kind="kfac", **options))
    assert isinstance(kfac, Kronecker)
    assert_close(kfac.input, inner, rtol=1e-5)
    assert_close(kfac.output, outer, rtol=1e-5)


@pytest.mark.parametrize("normalization", SIZES)
@pytest.mark.parametrize("floor", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("parameter", ["bert.pooler.dense.weight", "bert.encoder.layer.0.output.LayerNorm.bias"])
def test_curvatures_of_fisher(cases: dict[str, Any], normalization: str, floor: float, parameter: str) -> None:
    sums = cases["bert"].sums
    statistics = Statistics(Provenance(ALL, examples=EXAMPLES), sums)
    values = torch.maximum(sums.tensors[f"{parameter}.fisher"] / EXAMPLES, torch.tensor(floor))
    size = {"none": 1.0, "trace": values.mean(), "frobenius": values.square().sum().sqrt()}[normalization]
    options = CurvatureOptions(kind="fisher", floor=floor, normalization=normalization)
    fisher = statistics.curvature(parameter, options, dtype=torch.float64)
    assert isinstance(fisher, Diagonal)
    assert fisher.values.dtype == torch.float64
    assert_close(fisher.values, values / size, rtol=1e-5)


@pytest.mark.parametrize("normalization", SIZES)
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
def test_curvatures_of_blocks(cases: dict[str, Any], normalization: str, off_diagonal: float) -> None:
    parameter = "bert.encoder.layer.0.output.LayerNorm.bias"
    statistics = Statistics(Provenance(ALL, examples=EXAMPLES), cases["bert"].sums)
    expected = shrunk(cases["bert"].sums.tensors[f"{parameter}.block_fisher"] / EXAMPLES, off_diagonal)
    options = CurvatureOptions(kind="block_fisher", off_diagonal=off_diagonal, normalization=normalization)
    block = statistics.curvature(parameter, options, dtype=torch.float64)
    assert isinstance(block, Dense)
    assert block.matrix.dtype == torch.float64
    assert_close(block.matrix, expected / SIZES[normalization](expected), rtol=1e-5)


@pytest.mark.parametrize("normalization", SIZES)
def test_statistics_that_are_zero_stay_zero(normalization: str) -> None:
    zeros = {
        "a.input_gram": torch.zeros(3, 3),
        "a.output_gram": torch.zeros(2, 2),
        "a.weight.fisher": torch.zeros(2, 3),
        "a.weight.block_fisher": torch.zeros(6, 6),
    }
    statistics = Statistics(Provenance(ALL, examples=1), Sums(zeros, {"a": 1}, {}, 1))
    for kind in ALL:
        curvature = statistics.curvature("a.weight", CurvatureOptions(kind=kind, normalization=normalization))
        assert torch.equal(curvature.matvec(torch.ones(2, 3)), torch.zeros(2, 3))


# --- end to end


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private-place") / "expert"
    tiny_bert_classifier(folder, seed=4, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    return folder


def written(folder: Path, ending: str, rows: dict[str, list[Any]]) -> Path:
    path = folder / f"task.{ending}"
    dataset = datasets.Dataset.from_dict(rows)
    {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[ending](path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_compute_statistics_of_a_folder_with_a_file(expert: Path, tmp_path: Path, ending: str) -> None:
    texts = tiny_texts(6, 9)
    data = written(
        tmp_path,
        ending,
        {"id": list(range(6)), "sentence": texts, "label": ["bad", "good", "good", "bad", "bad", "good"]},
    )
    output = tmp_path / "out" / STATISTICS_FILE
    done = compute_statistics(expert, dataset=data, kind=("kfac", "fisher"), batch_size=4, output=output, device="cpu")
    assert done.path == output
    found = done.provenance
    assert (found.kinds, found.model, found.task) == (("kfac", "fisher"), "expert", "text-classification")
    assert (found.dataset, found.dataset_commit) == (f"task.{ending}", None)
    assert found.columns == {"text": ("sentence",), "label": "label"}
    assert (found.examples, found.label_source, found.dtype, found.max_length) == (6, "data", "float32", 32)
    assert found.tokens == sum(len(text.split()) + 2 for text in texts)
    assert found.fingerprint == open_source(expert).fingerprint
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    for place in (str(expert.parent), str(tmp_path), expert.parent.name):
        assert place not in json.dumps(metadata), "no local path is published"
    labels = [0, 1, 1, 0, 0, 1]
    memory = compute_statistics(
        expert,
        dataset=datasets.Dataset.from_dict({"words": texts, "y": labels}),
        kind=("kfac", "fisher"),
        text="words",
        label="y",
        device="cpu",
    )
    assert_same_sums(Sums(memory._sums.tensors, memory.tokens, memory.aliases, 6), done._sums)
    assert torch.equal(Statistics.load(output).tensor("classifier.output_gram"), done.tensor("classifier.output_gram"))


def test_progress_sees_every_batch(expert: Path) -> None:
    seen: list[Any] = []

    def progress(batches: Any, total: int, description: str) -> Any:
        seen.append((total, description))
        for batch in batches:
            seen.append(len(batch["labels"]))
            yield batch

    data = datasets.Dataset.from_dict({"text": tiny_texts(5), "label": [0, 1, 0, 1, 0]})
    compute_statistics(expert, dataset=data, kind="kfac", batch_size=2, device="cpu", progress=progress)
    assert seen == [(3, "statistics of expert"), 2, 2, 1]


def test_limit_draws_examples_by_seed(expert: Path) -> None:
    data = datasets.Dataset.from_dict({"text": tiny_texts(20, 3), "label": [i % 2 for i in range(20)]})
    key = "bert.pooler.dense.input_gram"

    def gram(**options: Any) -> Statistics:
        return compute_statistics(expert, dataset=data, kind="gram", device="cpu", **options)

    one, same, other = gram(examples=4, seed=1), gram(examples=4, seed=1), gram(examples=4, seed=2)
    assert (one.provenance.examples, one.provenance.seed, one.provenance.label_source) == (4, 1, "none")
    assert torch.equal(one.tensor(key), same.tensor(key))
    assert not torch.allclose(one.tensor(key), other.tensor(key))
    first = compute_statistics(expert, dataset=data.select(range(4)), kind="gram", device="cpu")
    assert not torch.allclose(one.tensor(key), first.tensor(key)), "drawn at random, not the first ones"
    assert_close(gram(examples=20).tensor(key), gram().tensor(key))


ADAPTERS: dict[str, tuple[Any, dict[str, Any], dict[str, list[Any]]]] = {
    "bert": (
        tiny_bert_body,
        {"target_modules": ["query", "dense"], "labels": 2},
        {"text": tiny_texts(5, 8), "label": [0, 1, 1, 0, 1]},
    ),
    "gpt2": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True},
        {"text": tiny_texts(5, 8)},
    ),
    "t5": (
        tiny_t5,
        {"target_modules": ["q", "v", "wi"], "task_type": "SEQ_2_SEQ_LM"},
        {"text": tiny_texts(5, 8), "target": tiny_texts(5, 9)},
    ),
}


def check_touched(touched: Statistics, whole: Statistics, adapter: Any) -> None:
    """Check that statistics are of what an adapter changes, and the same there as those of the whole model."""
    modules = adapter.get_base_model().named_modules()
    changed = {f"{name}.weight" for name, module in modules if hasattr(module, "lora_A")}
    is_classifier = adapter.peft_config["default"].task_type == "SEQ_CLS"
    saved = {"classifier.weight", "classifier.bias"} if is_classifier else set()
    assert set(touched.covers("fisher")) == changed | saved
    assert set(touched.covers("kfac")) == changed | saved
    assert set(touched.keys()) <= {f"{name}.fisher" for name in changed | saved} | {
        f"{name.rpartition('.')[0]}.{side}_gram" for name in changed | saved for side in ("input", "output")
    }
    assert set(touched.uses) == changed | saved
    assert len(touched.covers("kfac")) < len(whole.covers("kfac"))
    for options in (CurvatureOptions(kind="kfac"), CurvatureOptions(kind="fisher")):
        for name in touched.covers(options.kind):
            ours, theirs = (s.curvature(name, options) for s in (touched, whole))
            for part, value in vars(theirs).items():
                assert_close(getattr(ours, part), value, name)


@pytest.mark.parametrize("family", ADAPTERS)
def test_statistics_of_an_adapter_are_those_of_the_merged_model(tmp_path: Path, family: str) -> None:
    factory, options, rows = ADAPTERS[family]
    factory(tmp_path / "base", seed=1)
    adapter = lora_adapter(tmp_path / "base", tmp_path / "adapter", seed=2, **options)
    save(merged_lora(adapter), tmp_path / "full", family)
    data = written(tmp_path, "jsonl", rows)
    measure = partial(compute_statistics, dataset=data, kind=("kfac", "fisher"), batch_size=2, device="cpu")
    full, light = measure(tmp_path / "full"), measure(tmp_path / "adapter", modules="all")
    assert_same_sums(light._sums, full._sums)
    check_touched(measure(tmp_path / "adapter"), light, adapter)
    assert light.provenance.model == "adapter"
    assert light.provenance.transposed == full.provenance.transposed
    assert light.provenance.fingerprint == open_source(tmp_path / "adapter").fingerprint
    plain = measure(tmp_path / "base") if family != "bert" else None
    if plain is not None:
        key = next(key for key in plain.keys() if key.endswith(".output_gram"))  # noqa: SIM118
        assert not torch.allclose(plain.tensor(key), light.tensor(key), rtol=1e-2), "the adapter has an effect"
    with pytest.raises(StatisticsMismatch, match="adapter"):
        light.check_expert("it", full.provenance.fingerprint, "full")


TASK_TYPES = {"bert": {"labels": 2}, "gpt2": {"task_type": "CAUSAL_LM"}, "t5": {"task_type": "SEQ_2_SEQ_LM"}}


@pytest.fixture(scope="module", params=ADAPTERS)
def ia3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a base and an (IA)³ adapter of PEFT's default modules."""
    root, family = tmp_path_factory.mktemp("ia3"), request.param
    ADAPTERS[family][0](root / "base", seed=1)
    model = ia3_adapter(root / "base", root / "adapter", seed=2, **TASK_TYPES[family])
    data = datasets.Dataset.from_dict(ADAPTERS[family][2])
    measure = partial(compute_statistics, root / "adapter", dataset=data, device="cpu")
    return SimpleNamespace(family=family, root=root, model=model, data=data, measure=measure)


def test_statistics_of_ia3_are_of_its_vectors_beside_the_base(ia3: Any) -> None:
    found = ia3.measure(kind=("block_fisher", "fisher"))
    task = task_data(ia3.root / "base", ia3.model.get_base_model(), ia3.data)
    for parameter in ia3.model.parameters():
        parameter.requires_grad_(True)
    expected = direct_sums(ia3.model, task)
    vectors = {
        name.removeprefix("base_model.model.").removesuffix(".default"): name
        for name, _ in ia3.model.named_parameters()
        if "ia3_l" in name
    }
    assert all(name.endswith(".ia3_l") for name in vectors)
    for kind, sums in (("block_fisher", expected.block), ("fisher", expected.fisher)):
        assert set(found.covers(kind)) == vectors.keys()
        for own, name in vectors.items():
            assert_close(found.tensor(f"{own}.{kind}"), sums[name], own)
    assert len(found.keys()) == 2 * len(vectors)
    default = ia3.measure()
    assert (default.provenance.kinds, default.provenance.label_source) == (("block_fisher",), "data")
    for own in vectors:
        assert_close(default.tensor(f"{own}.block_fisher"), found.tensor(f"{own}.block_fisher"), own)
    assert default.provenance.fingerprint == open_source(ia3.root / "adapter").fingerprint


def test_ia3_vectors_have_no_grams_but_the_merged_modules_have(ia3: Any) -> None:
    for kind in ("gram", "kfac", ("block_fisher", "gram")):
        with pytest.raises(RecipeError, match=r"\(IA\)³ adapter changes vectors.*--modules all"):
            ia3.measure(kind=kind)
    save(merged_lora(ia3.model), ia3.root / "full", ia3.family)
    full = compute_statistics(ia3.root / "full", dataset=ia3.data, kind="gram", device="cpu")
    assert_same_sums(ia3.measure(kind="gram", modules="all")._sums, full._sums)


# --- sketches


def random_gram(width: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator) * torch.linspace(1, 0.01, width)
    return drawn.T @ drawn


@pytest.mark.parametrize("rows", [0, 3, 40])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_sketch_is_exact_on_its_probes_and_on_the_diagonal(rows: int, rank: int) -> None:
    gram = random_gram(12, rows, seed=1).double()
    probes = Sketch(rank).probes(["a"], 12)
    factor, rest = nystrom((gram @ probes.double()).float(), probes, gram.diagonal().float())
    assert factor.shape[0] == 12
    assert factor.shape[1] <= min(rank, rows)
    seen = factor.double() @ factor.double().T
    size = float(gram.norm())
    assert float((seen @ probes.double() - gram @ probes.double()).norm()) <= 1e-5 * size
    assert float((seen.diagonal() + rest - gram.diagonal()).norm()) <= 1e-5 * size
    assert float(rest.min()) >= 0
    assert float(torch.linalg.eigvalsh(gram - seen)[0]) >= -1e-5 * size, "what is left out is positive semidefinite"
    if rank >= min(12, rows):
        assert float((seen + rest.diag() - gram).norm()) <= 1e-5 * size


def test_probes_span_the_directions_of_all_that_share_an_input() -> None:
    rows = {
        name: torch.randn(size, 10, generator=torch.Generator().manual_seed(size))
        for name, size in (("a", 2), ("b", 3))
    }
    rows["s"] = rows["a"]
    cases = [(1, "a", 2), (1, "ab", 5), (4, "as", 4), (7, "an", 7), (99, "b", 10), (3, "abs", 7), (2, "n", 2)]
    for rank, modules, columns in cases:
        probes = Sketch(rank, rows).probes(list(modules), 10).double()
        assert probes.shape == (10, columns)
        torch.testing.assert_close(probes.T @ probes, torch.eye(columns).double(), rtol=0, atol=1e-6)
        for name in set(modules) & rows.keys():
            block = rows[name].double()
            torch.testing.assert_close(block @ probes @ probes.T, block, rtol=0, atol=1e-5)
    one, same, other = (Sketch(4, rows, seed).probes(["a"], 10) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(Sketch(4).probes(["a"], 10), Sketch(4).probes(["b"], 10), atol=1e-3)


@pytest.mark.parametrize("normalization", SIZES)
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("rows", [0, 20])
def test_curvatures_of_sketches_are_those_of_their_matrix(normalization: str, off_diagonal: float, rows: int) -> None:
    gram, probes = random_gram(8, rows, seed=2), Sketch(3).probes(["a"], 8)
    factor, rest = nystrom(gram @ probes, probes, gram.diagonal())
    tokens, aliases = {"a": 7, "b": 7}, {"b": "a"}
    sketch = Statistics(
        Provenance(("gram",)), Sums({"a.input_factor": factor, "a.input_rest": rest}, tokens, aliases, 3)
    )
    dense = Statistics(
        Provenance(("gram",)), Sums({"a.input_gram": factor @ factor.T + rest.diag()}, tokens, aliases, 3)
    )
    options = CurvatureOptions(kind="gram", off_diagonal=off_diagonal, normalization=normalization)
    assert sketch.covers("gram") == dense.covers("gram") == {"a.weight": (0, 8), "b.weight": (0, 8)}
    assert not sketch.covers("kfac")
    for parameter in ("a.weight", "b.weight"):
        low, whole = (s.curvature(parameter, options, dtype=torch.float64) for s in (sketch, dense))
        assert isinstance(low, LowRank)
        assert isinstance(whole, Gram)
        assert_close(low.dense().matrix, whole.matrix, rtol=1e-5)
        value = torch.randn(2, 8, generator=torch.Generator().manual_seed(3)).double()
        assert_close(low.matvec(value), whole.matvec(value), rtol=1e-4)


@pytest.fixture(scope="module", params=ADAPTERS)
def lora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a base and a LoRA adapter, and its exact Grams; its A factors are read from its file."""
    factory, options, rows = ADAPTERS[request.param]
    root = tmp_path_factory.mktemp("lora")
    factory(root / "base", seed=1)
    lora_adapter(root / "base", root / "adapter", seed=2, r=2, **options)
    stored = load_file(root / "adapter" / "adapter_model.safetensors")
    ending, prefix = ".lora_A.weight", "base_model.model."
    A = {k.removeprefix(prefix).removesuffix(ending): v for k, v in stored.items() if k.endswith(ending)}
    measure = partial(compute_statistics, root / "adapter", dataset=datasets.Dataset.from_dict(rows), device="cpu")
    sketched = partial(measure, for_adapter=True)
    return SimpleNamespace(root=root, A=A, exact=measure(kind="gram"), sketched=sketched)


def gram_and_sketch(lora: Any, found: Statistics) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return G, F and the rest, in float64, of every module whose input is sketched for itself or for others."""
    assert (found.tokens, found.aliases) == (lora.exact.tokens, lora.exact.aliases)
    grams = [key for key in lora.exact.keys() if key.endswith(".input_gram")]  # noqa: SIM118
    parts = {}
    for key in grams:
        module = key.removesuffix(".input_gram")
        held = (lora.exact.tensor(key), found.tensor(f"{module}.input_factor"), found.tensor(f"{module}.input_rest"))
        parts[module] = tuple(tensor.double() for tensor in held)
    assert len(found.keys()) == 2 * len(parts)
    return parts


@pytest.mark.parametrize("rank", [1, 7])
def test_sketches_are_exact_on_the_adapters_own_factors(lora: Any, rank: int) -> None:
    found = lora.sketched(rank=rank)
    parts = gram_and_sketch(lora, found)
    assert set(lora.A) <= found.tokens.keys()
    for module, A in lora.A.items():
        G, F, _ = parts[found.aliases.get(module, module)]
        product = A.double() @ G
        assert float((A.double() @ F @ F.T - product).norm()) <= 1e-5 * float(product.norm()), module
    shares = []
    for module, (G, F, rest) in parts.items():
        members = [name for name in lora.A if found.aliases.get(name, name) == module]
        assert F.shape[1] <= min(max(rank, 2 * len(members)), len(G))
        assert_close((F @ F.T).diagonal() + rest, G.diagonal(), module, rtol=1e-5)
        assert float(rest.min()) >= 0
        shares.append(float((G.trace() - (F @ F.T).trace()) / G.trace()))
    assert max(shares) > 0.01
    assert found.provenance.dropped == pytest.approx(max(shares), rel=1e-3)
    assert found.provenance.sketch_rank == rank
    assert (found.provenance.kinds, found.provenance.label_source) == (("gram",), "none")


def test_sketches_as_wide_as_the_module_are_the_gram(lora: Any) -> None:
    found = lora.sketched(rank=64)
    for module, (G, F, rest) in gram_and_sketch(lora, found).items():
        assert float((F @ F.T + rest.diag() - G).norm()) <= 1e-5 * float(G.norm()), module
    assert found.provenance.dropped < 1e-5
    assert lora.exact.provenance.sketch_rank is None


def test_sketches_depend_on_neither_batch_size_nor_run_but_on_the_seed(lora: Any, tmp_path: Path) -> None:
    one, again = lora.sketched(rank=7, output=tmp_path / "one"), lora.sketched(rank=7)
    split, other = lora.sketched(rank=7, batch_size=2), lora.sketched(rank=7, seed=1)
    mine, theirs, drawn = (gram_and_sketch(lora, found) for found in (one, split, other))
    for module, (G, F, rest) in mine.items():
        size = float(G.norm())
        _, F2, rest2 = theirs[module]
        assert float((F @ F.T - F2 @ F2.T).norm() + (rest - rest2).norm()) <= 1e-5 * size
    assert any(
        float((F @ F.T - drawn[m][1] @ drawn[m][1].T).norm()) > 1e-3 * float(G.norm()) for m, (G, F, _) in mine.items()
    )
    read = Statistics.load(one.path)
    assert (read.tokens, read.aliases, read.covers("gram")) == (one.tokens, one.aliases, lora.exact.covers("gram"))
    assert (read.provenance.sketch_rank, read.provenance.dropped) == (7, one.provenance.dropped)
    assert set(read.keys()) == set(one.keys())
    for key in one.keys():  # noqa: SIM118
        assert torch.equal(read.tensor(key), one.tensor(key))
        assert torch.equal(again.tensor(key), one.tensor(key))
        assert read.shape(key) == tuple(one.tensor(key).shape)


def test_a_file_of_sketches_is_small(tmp_path: Path) -> None:
    tiny_bert_body(tmp_path / "base", hidden_size=64, intermediate_size=512, num_hidden_layers=1)
    lora_adapter(tmp_path / "base", tmp_path / "adapter", r=2, target_modules=["dense"], labels=2)
    data = datasets.Dataset.from_dict(ADAPTERS["bert"][2])
    sizes = [
        compute_statistics(
            tmp_path / "adapter", dataset=data, kind="gram", rank=4 if light else None, for_adapter=light,
            output=tmp_path / str(light),
        ).path.stat().st_size
        for light in (False, True)
    ]  # fmt: skip
    assert sizes[1] < sizes[0] / 20


@pytest.mark.parametrize("rank", [1, 64])
def test_adapters_are_merged_with_sketches(tmp_path: Path, rank: int) -> None:
    tiny_gpt2(tmp_path / "base", seed=1)
    data, found = datasets.Dataset.from_dict({"text": tiny_texts(24, 8)}), {}
    for name, seed in (("one", 2), ("two", 3)):
        lora_adapter(tmp_path / "base", tmp_path / name, seed=seed, **ADAPTERS["gpt2"][1])
        found[name] = compute_statistics(
            tmp_path / name, dataset=data, for_adapter=True, rank=rank, output=tmp_path / name / STATISTICS_FILE
        )
    folders = [str(tmp_path / name) for name in found]
    merged = mats_hub.merge(folders, method="mats", curvature="gram", solver="exact", device="cpu")
    written = load_file(merged.folder / "adapter_model.safetensors")
    own = [load_file(tmp_path / name / "adapter_model.safetensors") for name in found]
    options = CurvatureOptions(kind="gram")
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        B, A = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "BA")
        X = written[B].double() @ written[A].double()
        deltas = [8 / 4 * held[B].double() @ held[A].double() for held in own]
        curvatures = [
            s.curvature(f"{name}.weight", options, dtype=torch.float64).dense().matrix for s in found.values()
        ]
        left = X @ sum(curvatures)
        right = sum(delta @ matrix for delta, matrix in zip(deltas, curvatures, strict=True))
        assert float((left - right).norm()) < 1e-3 * float(right.norm())
    assert len(merged.report.solved) == 6
    assert all(record.rank == 8 for record in merged.report.solved)


def test_adapters_of_other_modules_are_told_to_measure_all_of_them(tmp_path: Path) -> None:
    tiny_gpt2(tmp_path / "base", seed=1)
    data = datasets.Dataset.from_dict({"text": tiny_texts(4, 8)})
    folders = {name: tmp_path / name for name in ("c_attn", "c_fc")}

    def measure(modules: str) -> None:
        for folder in folders.values():
            compute_statistics(folder, dataset=data, modules=modules, output=folder / STATISTICS_FILE, device="cpu")

    for name, folder in folders.items():
        lora_adapter(tmp_path / "base", folder, task_type="CAUSAL_LM", target_modules=[name])
    measure("touched")
    options = {"method": "mats", "device": "cpu", "iterations": 2}
    with pytest.raises(PlanError, match="--modules all"):
        mats_hub.merge([str(folder) for folder in folders.values()], **options)
    measure("all")
    merged = mats_hub.merge([str(folder) for folder in folders.values()], **options)
    assert len(merged.report.solved) == 4


FOR_ADAPTERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "full checkpoint": ("base", {"for_adapter": True}, "is a full checkpoint"),
    "(IA)³": ("ia3", {"for_adapter": True}, r"is a \(IA\)³ adapter"),
    "kfac": ("lora", {"for_adapter": True, "kind": "kfac"}, "kind asked for is kfac"),
    "both kinds": ("lora", {"for_adapter": True, "kind": ["gram", "kfac"]}, "gram.*kfac"),
    "no rank": ("saved", {"for_adapter": True, "rank": 0}, "rank"),
    "modules": ("lora", {"modules": "touhced"}, r"'touhced'.*'touched'\?.*all"),
    "modules of (IA)³": ("ia3", {"modules": "al"}, r"'al'.*'all'\?"),
}


@pytest.fixture(scope="module")
def some_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    tiny_gpt2(root / "base")
    lora_adapter(root / "base", root / "lora", **ADAPTERS["gpt2"][1])
    lora_adapter(root / "base", root / "saved", **ADAPTERS["gpt2"][1], modules_to_save=["mlp.c_fc"])
    ia3_adapter(root / "base", root / "ia3", task_type="CAUSAL_LM")
    return root


@pytest.mark.parametrize("name", FOR_ADAPTERS)
def test_what_adapters_have_no_statistics_of_is_refused(some_adapters: Path, name: str) -> None:
    model, options, told = FOR_ADAPTERS[name]
    data = datasets.Dataset.from_dict({"text": tiny_texts(2)})
    with pytest.raises(RecipeError, match=told):
        compute_statistics(some_adapters / model, dataset=data, device="cpu", **options)


@pytest.mark.parametrize("kind", [None, "gram", ["gram"], ("gram",)], ids=str)
def test_sketches_are_of_kind_gram_however_it_is_said(some_adapters: Path, kind: Any) -> None:
    data = datasets.Dataset.from_dict({"text": tiny_texts(2)})
    found = compute_statistics(some_adapters / "lora", dataset=data, kind=kind, for_adapter=True, device="cpu")
    assert found.provenance.kinds == ("gram",)


def test_bfloat16_runs_are_summed_in_float32(expert: Path) -> None:
    data = datasets.Dataset.from_dict({"text": tiny_texts(4), "label": [0, 1, 0, 1]})
    rough = compute_statistics(expert, dataset=data, kind=ALL, dtype="bfloat16", device="cpu")
    fine = compute_statistics(expert, dataset=data, kind=ALL, device="cpu")
    assert rough.provenance.dtype == "bfloat16"
    assert {rough.tensor(key).dtype for key in rough.keys()} == {torch.float32}  # noqa: SIM118
    key = "bert.encoder.layer.1.attention.self.query.input_gram"
    torch.testing.assert_close(rough.tensor(key), fine.tensor(key), rtol=0.2, atol=0.05 * float(fine.tensor(key).max()))


def test_what_cannot_be_measured_is_refused(expert: Path, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["the film"], "label": [1]})
    with pytest.raises(RecipeError, match=r"'kfca'.*'kfac'\?.*gram"):
        compute_statistics(expert, dataset=rows, kind="kfca")
    (tmp_path / "data.txt").write_text("the film")
    with pytest.raises(SourceError, match=r"\.jsonl.*\.csv.*\.parquet"):
        compute_statistics(expert, dataset=tmp_path / "data.txt")
    (tmp_path / "data.jsonl").write_text("{not json\n")
    with pytest.raises(SourceError, match=r"data\.jsonl' cannot be read"):
        compute_statistics(expert, dataset=tmp_path / "data.jsonl")
    with pytest.raises(StatisticsError, match="no example"):
        compute_statistics(expert, dataset=rows.select([]), device="cpu")


# --- several processes


@pytest.mark.parametrize(
    ("family", "processes"),
    [("bert", 2), pytest.param("t5", 3, marks=pytest.mark.slow), pytest.param("llama", 2, marks=pytest.mark.slow)],
)
def test_several_processes_give_the_same_bytes_as_one(tmp_path: Path, family: str, processes: int) -> None:
    FACTORIES[family](tmp_path / "expert", seed=2)
    rows = examples_of(family, 11)
    data = written(tmp_path, "jsonl", {name: rows[name] for name in rows.column_names})
    command = ["statistics", str(tmp_path / "expert"), "--dataset", str(data), "--device", "cpu"]
    command += ["--kind", "kfac", "--batch-size", "2", "--labels", "data", "--output"]
    assert main([*command, str(tmp_path / "one.safetensors")]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "mats_hub"]
    options = [*launch, *command, str(tmp_path / "several.safetensors")]
    done = subprocess.run([sys.executable, *options], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, several = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "several"))
    assert one == several
    assert Statistics.load(tmp_path / "several.safetensors").provenance.examples == 11


# --- passes and interruptions


class Stop(Exception):
    """What interrupts a measurement in these tests."""


def stop_after(count: int) -> Callable[[Iterable[Any], int, str], Iterable[Any]]:
    """Return a progress that lets so many batches pass, over all passes, and then stops the measurement."""
    left = [count]

    def shown(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        for item in items:
            if not left[0]:
                raise Stop
            left[0] -= 1
            yield item

    return shown


KINDS = ["kfac", "fisher"]


@pytest.mark.parametrize(("family", "options"), crossed(FACTORIES, [{}, {"rank": 3}]))
def test_several_passes_give_what_one_gives(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    FACTORIES[family](tmp_path / "expert", seed=2)
    data = examples_of(family, 7)
    told: list[str] = []

    def shown(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
        told.append(description)
        return items

    for name, memory in (("one", "1GB"), ("several", "20KB")):
        compute_statistics(
            tmp_path / "expert", dataset=data, kind=KINDS, batch_size=3, device="cpu", memory=memory, progress=shown,
            output=tmp_path / f"{name}.safetensors", **options,
        )  # fmt: skip
    assert told[0] == "statistics of expert"
    count = len(told) - 1
    assert count > 2
    assert told[1:] == [f"statistics of expert, pass {i + 1} of {count}" for i in range(count)]
    one, several = (Statistics.load(tmp_path / f"{name}.safetensors") for name in ("one", "several"))
    if family == "t5":  # torch chooses another attention kernel where the position bias needs no gradient
        for key in one.keys():  # noqa: SIM118
            pair = [found.tensor(key) for found in (several, one)]
            pair = [value @ value.T for value in pair] if key.endswith("_factor") else pair
            assert_close(*pair, key, rtol=1e-3, floor=1e-3)
    else:
        assert one.path.read_bytes() == several.path.read_bytes()


@pytest.mark.parametrize(("memory", "options"), crossed(["60KB", "1GB"], [{}, {"rank": 3}, {"labels": "model"}]))
def test_an_interrupted_measurement_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(passes, "SAVE_EVERY", -1e9)  # so that every batch is recorded
    FACTORIES["bert"](tmp_path / "expert", seed=2)
    seen: list[int] = []

    def measure(name: str, progress: Any = None, **others: Any) -> bytes:
        compute_statistics(
            tmp_path / "expert", dataset=examples_of("bert", 7), kind=KINDS, batch_size=2, device="cpu", memory=memory,
            output=tmp_path / f"{name}.safetensors", progress=progress, **(options | others),
        )  # fmt: skip
        return (tmp_path / f"{name}.safetensors").read_bytes()

    def counted(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
        seen.append(total)
        return items

    expected = measure("whole", counted)
    passes_of_four = list(seen)
    assert set(passes_of_four) == {4}
    for count in (2, 1):  # interrupted twice
        with pytest.raises(Stop):
            measure("broken", stop_after(count))
    assert not (tmp_path / "broken.safetensors").exists()
    state = tmp_path / ".broken.safetensors.progress"
    assert state.is_dir()
    seen.clear()
    assert measure("broken", counted) == expected
    assert sum(seen) == sum(passes_of_four) - 3
    assert not state.exists()
    with pytest.raises(Stop):
        measure("other", stop_after(2), examples=6)
    seen.clear()
    assert measure("other", counted) == expected  # what other settings left behind is not used
    assert seen == passes_of_four


def test_an_interrupted_measurement_keeps_its_passes_when_memory_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "SAVE_EVERY", -1e9)
    FACTORIES["bert"](tmp_path / "expert", seed=2)
    told: list[str] = []

    def counted(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
        told.append(f"{description}: {total}")
        return items

    def measure(progress: Any, free: float) -> None:
        monkeypatch.setattr(measuring, "free_memory", lambda place, processes: free)
        compute_statistics(
            tmp_path / "expert", dataset=examples_of("bert", 6), batch_size=2, device="cpu", progress=progress,
            output=tmp_path / "statistics.safetensors",
        )  # fmt: skip

    with pytest.raises(Stop):
        measure(stop_after(4), 20_000)  # in the second pass
    measure(counted, 60_000)
    count = len(told)
    assert count > 2
    assert told[:2] == [f"statistics of expert, pass 1 of {count}: 0", f"statistics of expert, pass 2 of {count}: 2"]


@pytest.mark.slow
def test_a_killed_measurement_goes_on(tmp_path: Path) -> None:
    FACTORIES["bert"](tmp_path / "expert", seed=2)
    rows = examples_of("bert", 12)
    data = written(tmp_path, "jsonl", {name: rows[name] for name in rows.column_names})
    code = (
        "import os, sys\n"
        "import mats_hub\n"
        "from mats_hub.statistics import passes\n"
        "passes.SAVE_EVERY = -1e9\n"
        "def shown(items, total, description):\n"
        "    print(total, flush=True)\n"
        "    for number, item in enumerate(items):\n"
        "        if number == int(sys.argv[2]): os.kill(os.getpid(), 9)\n"
        "        yield item\n"
        f"mats_hub.compute_statistics({str(tmp_path / 'expert')!r}, dataset={str(data)!r}, batch_size=2, device='cpu',\n"
        "    output=sys.argv[1], progress=shown)\n"
    )

    def run(name: str, stop: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path / f"{name}.safetensors"), str(stop)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    assert run("whole", 99).stdout == "6\n"
    killed = run("broken", 4)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "broken.safetensors").exists()
    assert run("broken", 99).stdout == "2\n"
    assert (tmp_path / "broken.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_nothing_of_a_pass_is_kept_in_memory(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector, too, which does not see through the graph of the gradients."""
    alive: weakref.WeakSet[Watch] = weakref.WeakSet()
    begin = Watch.__init__

    def counted(self: Watch, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        alive.add(self)

    monkeypatch.setattr(Watch, "__init__", counted)
    gc.collect()
    gc.disable()
    try:
        collect(case.model, case.data.batches(2), ("kfac",), case.data.loss, case.data.masks)
    finally:
        gc.enable()
    assert not alive


@pytest.mark.parametrize("kinds", [["kfac"], ["gram"], ["fisher"], ["kfac", "fisher", "block_fisher"]])
@pytest.mark.parametrize("rank", [None, 3])
def test_what_the_sums_take_is_known_before_they_are_measured(case: Any, kinds: list[str], rank: int | None) -> None:
    data = case.data
    seen = survey(case.model, next(data.batches(3)), data.masks)
    sums = collect(case.model, data.batches(3), kinds, data.loss, data.masks, sketch=Sketch(rank) if rank else None)
    held = sum(value.numel() * value.element_size() for value in sums.tensors.values())
    known = sum(size for _, size in passes.costs(case.model, seen, kinds, None, rank))
    assert held <= known * 1.01
    assert known <= held * 1.6


def test_a_spread_model_is_measured_as_one_on_a_device(tmp_path: Path) -> None:
    FACTORIES["llama"](tmp_path / "expert", seed=2)
    whole = compute_statistics(tmp_path / "expert", dataset=examples_of("llama", 4), device="cpu")
    spread = compute_statistics(tmp_path / "expert", dataset=examples_of("llama", 4), device_map="auto")
    for key in whole.keys():  # noqa: SIM118
        torch.testing.assert_close(spread.tensor(key).cpu(), whole.tensor(key), rtol=1e-4, atol=1e-6)
    with pytest.raises(RecipeError, match=r"device map 'atuo'.*'auto'"):
        compute_statistics(tmp_path / "expert", dataset=examples_of("llama", 4), device_map="atuo")


# --- storage


def stacked_statistics() -> Statistics:
    """Return statistics with a sum of every shape, over twelve orders of magnitude."""
    generator = torch.Generator().manual_seed(3)

    def gram(*shape: int) -> Tensor:
        rows = torch.randn(*shape[:-1], 9, shape[-1], generator=generator) * torch.logspace(-3, 3, shape[-1])
        product = rows.mT @ rows
        return product.triu() + product.triu(1).mT

    tensors = {
        "a.input_gram": gram(6),
        "a.output_gram": gram(4) * 1e9,
        "e.input_gram": gram(3, 5),
        "w.input_counts": torch.tensor([0.0, 3.0, 70000.0]),
        "n.weight.input_squares": torch.tensor([1e-9, 2.0, 1e9]),
        "a.weight.fisher": torch.rand(4, 6, generator=generator) ** 8 * 1e-6,
        "b.input_factor": torch.randn(6, 2, generator=generator) * 1e6,
        "b.input_rest": torch.rand(6, generator=generator),
    }
    uses = {
        "a.weight": [("linear", "a")],
        "e": [("experts", "e")],
        "w.weight": [("embedding", "w")],
        "n.weight": [("norm", "n")],
        "b.weight": [("linear", "b")],
    }
    tokens = dict.fromkeys(("a", "e", "w", "n", "b"), 9)
    return Statistics(Provenance(("gram", "kfac", "fisher"), examples=9), Sums(tensors, tokens, {}, 9, uses=uses))


@pytest.mark.parametrize(("storage", "rtol"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_narrow_storage_keeps_every_scale_and_diagonal(tmp_path: Path, storage: str, rtol: float) -> None:
    held = stacked_statistics()
    read = Statistics.load(held.save(tmp_path / "s.safetensors", storage))
    assert set(read.keys()) == set(held._sums.tensors)
    for key, value in held._sums.tensors.items():
        found = read.tensor(key)
        assert found.dtype == torch.float32
        assert read.shape(key) == tuple(value.shape) == tuple(found.shape)
        if key.endswith("_gram"):
            size = value.diagonal(dim1=-2, dim2=-1).sqrt()
            wrong = (found - value) / size[..., None] / size[..., None, :]
            assert float(wrong.abs().max()) <= rtol
            torch.testing.assert_close(
                found.diagonal(dim1=-2, dim2=-1), value.diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=0
            )
        elif key.endswith(".fisher"):
            torch.testing.assert_close(found.sqrt(), value.sqrt(), rtol=2 * rtol, atol=1e-7 * float(value.max()) ** 0.5)
        else:
            torch.testing.assert_close(found, value, rtol=2 * rtol, atol=0)
    assert read.covers("gram") == held.covers("gram")
    assert read.accuracy == pytest.approx({"float32": 1.2e-7, "float16": 9.8e-4, "bfloat16": 7.8e-3}[storage], rel=0.01)
    again = Statistics.load(read.save(tmp_path / "again.safetensors", storage))
    assert all(torch.equal(again.tensor(key), read.tensor(key)) for key in read.keys())  # noqa: SIM118


def test_an_unknown_dtype_to_store_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown dtype to store statistics in 'float8'.*float16"):
        stacked_statistics().save(tmp_path / "s.safetensors", "float8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_large_statistics_are_several_files_with_an_index(tmp_path: Path, storage: str) -> None:
    held = stacked_statistics()
    whole = Statistics.load(held.save(tmp_path / "whole.safetensors", storage))
    index = held.save(tmp_path / "s.safetensors", storage, max_shard_bytes=100)
    assert index.name == "s.safetensors.index.json"
    assert len(list(tmp_path.glob("s-0*.safetensors"))) > 2
    assert not (tmp_path / "s.safetensors").exists()
    for path in (index, tmp_path / "s.safetensors"):
        read = Statistics.load(path)
        assert read.provenance == whole.provenance
        assert all(torch.equal(read.tensor(key), whole.tensor(key)) for key in whole.keys())  # noqa: SIM118
        assert {file.name for file in read.files} == {p.name for p in tmp_path.glob("s-0*")} | {index.name}
    content = json.loads(index.read_text())
    content["weight_map"]["a.input_gram"] = "../whole.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(StatisticsError, match=r"'\.\./whole\.safetensors', which is no plain file name"):
        Statistics.load(index)


def test_a_merge_with_narrow_statistics_is_nearly_the_same(expert: Path, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": tiny_texts(24, 3), "label": [0, 1] * 12})
    other = save(perturbed(tiny_bert_classifier(seed=4), 5), tmp_path / "other", "bert")
    merged = {}
    for stored in ("float32", "float16"):
        entries = []
        for name, folder in (("one", expert), ("two", other)):
            file = tmp_path / f"{name}-{stored}.safetensors"
            compute_statistics(folder, dataset=data, kind="kfac", storage=stored, output=file, device="cpu")
            entries.append({"model": str(folder), "name": name, "statistics": str(file)})
        merged[stored] = {
            method: mats_hub.merge(entries, base=str(expert), method=method, device="cpu", **options)
            for method, options in (("regmean", {}), ("mats", {"iterations": 20}))
        }
    for method, exact in merged["float32"].items():
        theirs, ours = (load_file(m.folder / "model.safetensors") for m in (exact, merged["float16"][method]))
        start = load_file(expert / "model.safetensors")
        moved = sum(float((theirs[key] - start[key]).square().sum()) for key in theirs)
        apart = sum(float((theirs[key] - ours[key]).square().sum()) for key in theirs)
        assert apart < 0.25**2 * moved, method


@pytest.mark.parametrize("rank", [4, 64])
def test_kfac_of_sketches(expert: Path, tmp_path: Path, rank: int) -> None:
    data = datasets.Dataset.from_dict({"text": tiny_texts(24, 3), "label": [0, 1] * 12})
    whole, sketched = (
        compute_statistics(expert, dataset=data, kind="kfac", rank=r, output=tmp_path / f"{r}", device="cpu")
        for r in (None, rank)
    )
    assert sketched.covers("kfac").keys() == whole.covers("kfac").keys()
    assert not any(key.endswith("_gram") for key in sketched.keys())  # noqa: SIM118
    options = CurvatureOptions(kind="kfac")
    for parameter in whole.covers("kfac", ("linear", "bias")):
        exact, near = (s.curvature(parameter, options) for s in (whole, sketched))
        held = [
            value
            for part in vars(near).values()
            for value in ([part] if isinstance(part, Tensor) else [*vars(part).values()])
        ]
        assert sketched.entries(parameter, "kfac", dense=False) == sum(value.numel() for value in held)
        assert sketched.entries(parameter, "kfac") == whole.entries(parameter, "kfac")
        if isinstance(near, Kronecker):
            assert isinstance(near.input, LowRank) == (2 * rank < len(exact.input))
        for part, value in vars(exact).items():
            if isinstance(value, Tensor) and value.dim() == 2:
                found = written_out(getattr(near, part))
                torch.testing.assert_close(
                    found.diagonal(), value.diagonal(), rtol=1e-4, atol=1e-6 * float(value.abs().max())
                )
                assert rank < 64 or float((found - value).norm()) < 1e-4 * float(value.norm()) + 1e-12
