"""Damaged and hostile files: always an error of ours that says what is wrong, never a crash and never a merge."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import family as families
import models
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mats_hub
from mats_hub.errors import MatsError

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
LESS = settings(QUICK, max_examples=20)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = families.make_family(tmp_path_factory.mktemp("family"))
    expert = Path(made.experts[0])
    mats_hub.compute_statistics(expert, dataset=made.data("alpha"), output=expert / "statistics.safetensors")
    models.lora_adapter(Path(made.base), made.root / "adapter", seed=3, labels=2)
    return made


def refused_or_merged(expert: Path, base: str, method: str) -> None:
    """Plan and merge one expert; anything but success or an error of ours fails the test."""
    try:
        merged = mats_hub.merge([{"model": str(expert), "name": "it"}], base=base, method=method)
    except MatsError:
        return
    assert (merged.folder / "mats_report.json").exists()


def spoiled(family, tmp_path_factory, name: str) -> Path:
    folder = tmp_path_factory.mktemp("spoiled") / name
    shutil.copytree(family.root / name, folder)
    return folder


@QUICK
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), file=st.sampled_from(["model", "statistics"]))
def test_flipped_bytes_in_a_header(family, tmp_path_factory, seed, count, file):
    folder = spoiled(family, tmp_path_factory, "alpha")
    path = folder / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(seed)
    for _ in range(count):
        data[draw.randrange(end)] = draw.randrange(256)
    path.write_bytes(data)
    refused_or_merged(folder, family.base, "mats" if file == "statistics" else "average")


@QUICK
@given(length=st.integers(0, 4000), file=st.sampled_from(["model", "statistics"]))
def test_files_cut_anywhere(family, tmp_path_factory, length, file):
    folder = spoiled(family, tmp_path_factory, "alpha")
    path = folder / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(MatsError):
        mats_hub.merge([str(folder)], base=family.base, method="mats" if file == "statistics" else "average")


FIELDS = {
    "config.json": ["architectures", "model_type", "id2label", "num_labels", "quantization_config", "hidden_size", "dtype"],
    "adapter_config.json": [
        "peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "fan_in_fan_out", "revision",
        "base_model_name_or_path", "task_type", "use_dora", "bias", "init_lora_weights", "target_parameters",
        "feedforward_modules",
    ],
}  # fmt: skip


@QUICK
@given(data=st.data(), file=st.sampled_from(sorted(FIELDS)), value=JUNK)
def test_junk_in_a_config(family, tmp_path_factory, data, file, value):
    name = "adapter" if file == "adapter_config.json" else "alpha"
    folder = spoiled(family, tmp_path_factory, name)
    content = json.loads((folder / file).read_text())
    content[data.draw(st.sampled_from(FIELDS[file]))] = value
    (folder / file).write_text(json.dumps(content))
    refused_or_merged(folder, family.base, "average")


@QUICK
@given(value=JUNK, whole=st.booleans())
def test_junk_in_an_index(family, tmp_path_factory, value, whole):
    folder = spoiled(family, tmp_path_factory, "alpha")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    content = value if whole else {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": value}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    refused_or_merged(folder, family.base, "average")


@LESS
@given(
    text=st.text(max_size=80) | st.builds(json.dumps, JUNK),
    before=st.sampled_from(["", "---\n", "---\nlicense: mit\n"]),
)
def test_junk_in_a_card(family, tmp_path_factory, text, before):
    """A parent's card is read for its licence; the merged model's card can be read whatever stood there."""
    folder = spoiled(family, tmp_path_factory, "alpha")
    (folder / "README.md").write_text(f"{before}{text}\n---\nx", encoding="utf-8", errors="replace")
    merged = mats_hub.merge([str(folder)], base=family.base, method="average")
    assert "merge" in ModelCard.load(merged.folder / "README.md").data.tags


@LESS
@given(data=st.data(), value=JUNK)
def test_junk_in_what_statistics_say_of_themselves(family, tmp_path_factory, data, value):
    folder = spoiled(family, tmp_path_factory, "alpha")
    path = folder / "statistics.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    key = data.draw(st.sampled_from(sorted(metadata)))
    try:
        content = json.loads(metadata[key])
    except ValueError:
        content = None
    if isinstance(content, dict) and content and data.draw(st.booleans()):
        content[data.draw(st.sampled_from(sorted(content)))] = value
    else:
        content = value
    save_file(tensors, path, metadata | {key: json.dumps(content)})
    refused_or_merged(folder, family.base, "mats")


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@LESS
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=2, max_size=5),
    method=st.sampled_from(["average", "task_arithmetic", "ties"]),
    scale=st.floats(0.1, 2.0),
    seed=st.integers(0, 2**32),
)
def test_any_shapes_dtypes_and_number_of_experts(tmp_path_factory, shapes, dtypes, method, scale, seed):
    """Models of no known architecture, each stored in a dtype of its own, against the formulas in float64."""
    root, draw = tmp_path_factory.mktemp("any"), torch.Generator().manual_seed(seed)
    states = []
    for number, dtype in enumerate(dtypes):
        folder = root / f"model{number}"
        folder.mkdir()
        state = {f"t{i}": torch.randn(shape, generator=draw).to(DTYPES[dtype]) for i, shape in enumerate(shapes)}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "made-up"}')
        states.append(torch.cat([value.double().flatten() for value in state.values()]))
    base, *experts = states
    folders = [str(root / f"model{number}") for number in range(len(dtypes))]
    options = {} if method == "average" else {"scale": scale}
    merged = mats_hub.merge(folders[1:], base=folders[0], method=method, dtype="float32", **options)
    written = load_file(merged.folder / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in written.items()} == {f"t{i}": s for i, s in enumerate(shapes)}
    deltas = torch.stack([expert - base for expert in experts])
    if method == "ties":
        cuts = deltas.abs().float().kthvalue(max(1, len(base) - int(0.2 * len(base)))).values
        deltas = torch.where(deltas.abs().float() >= cuts[:, None], deltas, 0)
        agreeing = deltas * torch.where(deltas.sum(0) >= 0, 1, -1) > 0
        expected = base + scale * (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    else:
        expected = base + (scale * deltas.sum(0) if method == "task_arithmetic" else deltas.mean(0))
    found = torch.cat([written[f"t{i}"].double().flatten() for i in range(len(shapes))])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@QUICK
@given(text=st.text(max_size=60) | st.builds(json.dumps, JUNK))
def test_junk_as_a_recipe(text):
    with pytest.raises(MatsError):
        mats_hub.Recipe.from_yaml(text)


@QUICK
@given(data=st.data(), value=JUNK)
def test_junk_in_a_recipe(data, value):
    content = mats_hub.Recipe.build(["a", "b"], method="mats", initialization="ties").model_dump(mode="json")
    part = data.draw(st.sampled_from([content, content["initialization"], content["solver"], content["experts"][0]]))
    part[data.draw(st.sampled_from(sorted(part)))] = value
    refused_or_a_recipe(content)


@QUICK
@given(data=st.data(), value=JUNK, method=st.sampled_from(["ties", "linear", "slerp"]))
def test_junk_in_a_configuration_of_mergekit(data, value, method):
    model = {"model": "a", "parameters": {"weight": 0.5, "density": 0.3}}
    shared = {"lambda": 1.0, "normalize": True, "rescale": None, "t": 0.3}
    content = {"merge_method": method, "models": [model, {"model": "b"}], "base_model": "b", "parameters": shared}
    content |= {"dtype": "float32", "out_dtype": None, "tokenizer": {"source": "base"}, "tokenizer_source": None}
    part = data.draw(st.sampled_from([content, content, model, model["parameters"], shared, content["tokenizer"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = value
    refused_or_a_recipe(content)


def refused_or_a_recipe(content):
    try:
        recipe = mats_hub.Recipe.from_mapping(content)
    except MatsError:
        return
    assert mats_hub.Recipe.from_yaml(recipe.to_yaml()) == recipe


@QUICK
@given(value=JUNK)
def test_junk_in_a_report(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("report")
    (folder / "mats_report.json").write_text(json.dumps(value))
    with pytest.raises(MatsError):
        mats_hub.MergedModel.open(folder)
