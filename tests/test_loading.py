"""Checkpoints, adapters and experts as they are read from files, against safetensors, transformers and PEFT."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    FACTORIES,
    _made,
    lora_adapter,
    merged_lora,
    perturbed,
    save,
    state,
    tiny_bert_body,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_tokenizer,
    tiny_vit,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mamba2Config, ViTImageProcessor

from mats_hub.adapter_opening import open_adapter
from mats_hub.architecture import Architecture, _described, align, describe
from mats_hub.checkpoint import TORCH_DTYPES, Checkpoint, CheckpointWriter, parse_size, shard_layout
from mats_hub.delta import DenseDelta, LowRankDelta
from mats_hub.errors import CheckpointError, IncompatibleExperts, SourceError
from mats_hub.expert import Expert
from mats_hub.loading import load_expert
from mats_hub.lora import LoraAdapter
from mats_hub.source import open_source
from mats_hub.tensor_header import TensorHeader

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(open_source(folder))


def expert_of(folder: Path, base: Path | None = None) -> Expert:
    source = open_source(folder)
    expert = Expert(source, source.name)
    if base is not None:
        expert.align_to(checkpoint(base))
        expert.name_as_stored(checkpoint(base))
    return expert


def stored(folder: Path) -> dict[str, Tensor]:
    """Return everything the folder's safetensors files hold, read by safetensors itself."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


# --- checkpoints


@pytest.mark.parametrize("family", FACTORIES)
@pytest.mark.parametrize("shard", ["50GB", "5KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_checkpoint_reads_what_safetensors_reads(tmp_path: Path, family: str, shard: str, dtype: torch.dtype) -> None:
    folder = save(FACTORIES[family](seed=1).to(dtype), tmp_path / family, max_shard_size=shard)
    expected, files = stored(folder), sorted(path.name for path in folder.glob("*.safetensors"))
    found = checkpoint(folder)
    assert (len(files) > 1) == (shard == "5KB")
    assert found.source.weight_files == tuple(files)
    assert found.headers.keys() == expected.keys()
    for name, tensor in expected.items():
        header = found.headers[name]
        assert (header.shape, header.dtype) == (tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
        assert (header.numel, header.nbytes, header.is_float) == (tensor.numel(), tensor.nbytes, True)
        assert torch.equal(found.tensor(name), tensor)
    assert found.config == json.loads((folder / "config.json").read_text())


def test_integers_and_truth_values_are_no_floats(tmp_path: Path) -> None:
    tensors = {"mask": torch.tensor([True, False]), "ids": torch.arange(3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = checkpoint(tmp_path)
    assert {name: header.is_float for name, header in found.headers.items()} == {
        "mask": False,
        "ids": False,
        "scalar": True,
    }
    assert found.headers["scalar"].shape == ()
    assert found.config == {}
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in tensors.items())


def test_single_file_is_preferred_to_an_index_beside_it(tmp_path: Path) -> None:
    save(tiny_bert_body(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert checkpoint(tmp_path).source.weight_files == ("model.safetensors",)


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def with_header(path: Path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def one_entry(**fields: Any) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}).encode()


def remap(filename: str) -> Callable[[Path], Any]:
    """Make the index send its first tensor to another file."""

    def change(index: dict[str, Any]) -> dict[str, Any]:
        first = next(iter(index["weight_map"]))
        return index | {"weight_map": index["weight_map"] | {first: filename}}

    return lambda folder: edit(folder / "model.safetensors.index.json", change)


def index_is(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def pickled(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"\x80\x04N.")

    return change


def quantized(**content: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder / "config.json", lambda config: config | {"quantization_config": content})


def header_is(text: bytes, data: bytes = b"\0" * 8) -> Callable[[Path], Any]:
    return lambda folder: with_header(folder / "model.safetensors", text, data)


OUTSIDE = "not a plain file name"
BROKEN: dict[str, tuple[bool, Callable[[Path], Any], str]] = {
    # name: whether the model is sharded, what is done to it, what the message tells
    "shard cut in its data": (True, lambda f: truncate(first_shard(f), -9), r"00001-of-.*cut short.*fetch"),
    "shard cut in its header": (True, lambda f: truncate(first_shard(f), 60), r"00001-of-.*cut short.*fetch"),
    "shard of four bytes": (True, lambda f: truncate(first_shard(f), 4), r"cut short \(4 bytes\)"),
    "empty file": (False, lambda f: truncate(f / "model.safetensors", 0), r"cut short \(0 bytes\)"),
    "a page instead": (
        False,
        lambda f: (f / "model.safetensors").write_text("<html>no</html>"),
        "not a safetensors file",
    ),
    "index above": (True, remap("../x.safetensors"), rf"'\.\./x\.safetensors'.*{OUTSIDE}"),
    "index absolute": (True, remap("/etc/x.safetensors"), rf"'/etc/x\.safetensors'.*{OUTSIDE}"),
    "index with drive": (True, remap("C:\\x.safetensors"), OUTSIDE),
    "index into a folder": (True, remap("sub/x.safetensors"), OUTSIDE),
    "index to a pickle": (True, remap("pytorch_model.bin"), OUTSIDE),
    "index to a hidden file": (True, remap(".x.safetensors"), OUTSIDE),
    "index with a line break": (True, remap("x.safetensors\n"), OUTSIDE),
    "index to nothing": (
        True,
        remap("model-7.safetensors"),
        r"names 'model-7\.safetensors', which is not there.*incomplete",
    ),
    "index malformed": (True, index_is('{"weight_map": '), r"index\.json is not valid JSON"),
    "index nested deeply": (True, index_is("[" * 100_000), r"index\.json is not valid JSON"),
    "index a list": (True, index_is("[]"), r"index\.json holds a list"),
    "index without map": (True, index_is("{}"), "no weight_map"),
    "index map of numbers": (True, index_is('{"weight_map": {"a": 1}}'), "no weight_map of file names"),
    "index of no file": (True, index_is('{"weight_map": {}}'), "names no file that holds a weight"),
    "tensor in two shards": (
        True,
        lambda f: save_file(load_file(first_shard(f)), max(f.glob("*.safetensors"))),
        r"tensor '.*' is in both model-00001.*and",
    ),
    "pickle": (False, pickled("pytorch_model.bin"), r"pickle \(pytorch_model\.bin\).*run code.*save_pretrained"),
    "sharded pickle": (False, pickled("pytorch_model-00001-of-00002.bin"), "pickle.*run code"),
    "no weights": (
        False,
        lambda f: (f / "model.safetensors").unlink(),
        r"has no model\.safetensors; it holds: config\.json",
    ),
    "quantized": (False, quantized(quant_method="gptq", bits=4), r"quantized \(gptq\).*quantized from"),
    "quantized somehow": (False, quantized(bits=4), "quantized.*quantized from"),
    "config malformed": (
        False,
        lambda f: (f / "config.json").write_text("{'a': 1}"),
        r"config\.json is not valid JSON",
    ),
    "config not text": (
        False,
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe"),
        r"config\.json is not valid JSON",
    ),
    "config a string": (False, lambda f: (f / "config.json").write_text('"bert"'), r"config\.json holds a str"),
    "header no JSON": (False, header_is(b"{nothing at all}"), "malformed safetensors header"),
    "header not text": (False, header_is(b"\xff" * 16), "malformed safetensors header"),
    "header nested deeply": (False, header_is(b"[" * 100_000), "malformed safetensors header"),
    "header a list": (False, header_is(b"[]" + b" " * 6), "malformed safetensors header"),
    "entry a number": (False, header_is(b'{"w": 3}'), "tensor 'w' is malformed"),
    "entry of unknown dtype": (
        False,
        header_is(one_entry(dtype="F3")),
        "tensor 'w' is malformed or of an unknown dtype",
    ),
    "entry without shape": (False, header_is(one_entry(shape=None)), "tensor 'w' is malformed"),
    "entry of negative shape": (False, header_is(one_entry(shape=[-1, -2])), "tensor 'w' is malformed"),
    "entry of fractions": (False, header_is(one_entry(shape=[2.0])), "tensor 'w' is malformed"),
    "entry smaller than its shape": (False, header_is(one_entry(shape=[3])), "tensor 'w' is malformed"),
    "entry before the data": (False, header_is(one_entry(data_offsets=[-8, 0])), "tensor 'w' is malformed"),
    "entry behind the data": (
        False,
        header_is(one_entry(data_offsets=[8, 16])),
        "cut short: tensor 'w' ends at byte 16",
    ),
    "entry backwards": (False, header_is(one_entry(data_offsets=[8, 0])), "tensor 'w' is malformed"),
    "entry with three offsets": (False, header_is(one_entry(data_offsets=[0, 4, 8])), "tensor 'w' is malformed"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return a sound checkpoint, sharded and not."""
    root = tmp_path_factory.mktemp("sound")
    model = tiny_bert_body(seed=1)
    return {cut: save(model, root / str(cut), max_shard_size="10KB" if cut else "1GB") for cut in (True, False)}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_refused(sound: dict[bool, Path], tmp_path: Path, name: str) -> None:
    sharded, spoil, told = BROKEN[name]
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in sound[sharded].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    checkpoint(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=f"(?s){told}") as caught:
        checkpoint(folder)
    assert "broken" in str(caught.value)


def test_file_spoilt_after_opening_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_bert_body(), tmp_path / "late")
    found = checkpoint(folder)
    truncate(folder / "model.safetensors", -100)
    with pytest.raises(CheckpointError, match=r"late.*model\.safetensors cannot be read"):
        found.tensor("embeddings.word_embeddings.weight")


@pytest.mark.parametrize("spec", ["no/such/folder/", "../up", "a b", "/nowhere/at/all", "-x"])
def test_names_that_are_neither_folder_nor_id_are_refused(spec: str) -> None:
    with pytest.raises(SourceError, match="neither a folder on this machine nor a Hub id"):
        open_source(spec)


# --- names


NAMES = ["embeddings.w", "encoder.0.q.weight", "encoder.0.q.bias", "pooler.w"]
ALIGNED: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "identity": (NAMES, NAMES, {name: name for name in NAMES}),
    "head onto body": (
        [f"bert.{name}" for name in NAMES] + ["classifier.weight"],
        NAMES,
        {f"bert.{name}": name for name in NAMES},
    ),
    "body onto head": (
        NAMES,
        [f"bert.{name}" for name in NAMES] + ["classifier.weight"],
        {name: f"bert.{name}" for name in NAMES},
    ),
    "two parts of a prefix": (
        [f"base.model.{name}" for name in NAMES],
        NAMES,
        {f"base.model.{name}": name for name in NAMES},
    ),
    "gamma and beta": (
        ["bert.a.LayerNorm.gamma", "bert.a.LayerNorm.beta", "bert.a.weight"],
        ["a.LayerNorm.weight", "a.LayerNorm.bias", "a.weight"],
        {
            "bert.a.LayerNorm.gamma": "a.LayerNorm.weight",
            "bert.a.LayerNorm.beta": "a.LayerNorm.bias",
            "bert.a.weight": "a.weight",
        },
    ),
    "onto gamma and beta": (
        ["a.LayerNorm.weight", "a.LayerNorm.bias"],
        ["bert.a.LayerNorm.gamma", "bert.a.LayerNorm.beta"],
        {"a.LayerNorm.weight": "bert.a.LayerNorm.gamma", "a.LayerNorm.bias": "bert.a.LayerNorm.beta"},
    ),
    "nothing in common": (["x.y"], ["a.b", "c"], {}),
    "nothing": ([], NAMES, {}),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_align(name: str) -> None:
    names, reference, expected = ALIGNED[name]
    assert align(names, reference) == expected


def test_align_follows_names_that_transformers_changes() -> None:
    renamed = {"vit.layers.0.q.weight": "vit.encoder.layer.0.query.weight"}
    assert align(["layers.0.q.weight"], ["vit.encoder.layer.0.query.weight"], renamed) == {
        "layers.0.q.weight": "vit.encoder.layer.0.query.weight"
    }
    assert align(["vit.encoder.layer.0.query.weight"], ["vit.layers.0.q.weight"], renamed) == {
        "vit.encoder.layer.0.query.weight": "vit.layers.0.q.weight"
    }


ARCHITECTURES = {
    "bert": ("BertForSequenceClassification", "bert.", {}, 0),
    "gpt2": ("GPT2LMHeadModel", "transformer.", {"lm_head.weight": "transformer.wte.weight"}, 8),
    "llama": ("LlamaForCausalLM", "model.", {}, 0),
    "t5": ("T5ForConditionalGeneration", "", {"lm_head.weight": "shared.weight"}, 0),
    "vit": ("ViTForImageClassification", "vit.", {}, 0),
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_describe(family: str) -> None:
    class_name, prefix, tied, transposed = ARCHITECTURES[family]
    model = FACTORIES[family]()
    found = describe(model.config.to_dict() | {"architectures": [class_name]})
    assert (found.class_name, found.prefix, len(found.transposed)) == (class_name, prefix, transposed)
    assert tied.items() <= dict(found.tied).items()
    assert bool(found.tied) == bool(tied)
    assert all(model.get_parameter(name).shape[0] != 0 for name in found.transposed)


@pytest.mark.parametrize(
    "config",
    [{}, {"architectures": ["SomeoneElsesModel"], "model_type": "theirs"}, {"architectures": ["BertModel"]}],
    ids=["empty", "foreign", "without model_type"],
)
def test_describe_of_what_transformers_does_not_know_is_empty(config: dict[str, Any]) -> None:
    found = describe(config)
    assert (found.prefix, found.tied, found.transposed, found.stored_names) == ("", {}, frozenset(), {})


def test_facts_of_a_config_with_an_infinite_number(tmp_path: Path) -> None:
    """JSON has none, so that transformers writes an object in its place: in every config of a Mamba-2."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 4, "n_groups": 1, "state_size": 4}
    config = Mamba2Config(**shape)
    config.architectures = ["Mamba2ForCausalLM"]
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert "backbone.layers.0.mixer.in_proj.weight" in describe(content).shapes


@pytest.mark.slow
def test_facts_are_kept_for_the_next_process(tmp_path: Path) -> None:
    config = json.loads(json.dumps(tiny_gpt2().config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}))
    asked = (
        "import sys, json; from mats_hub.architecture import describe; "
        "found = describe(json.loads(sys.stdin.read())); print('transformers' in sys.modules, repr(found))"
    )

    def ask() -> tuple[str, Architecture]:
        run = subprocess.run(
            [sys.executable, "-c", asked],
            input=json.dumps(config),
            env=os.environ | {"HF_ASSETS_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        imported, _, said = run.stdout.partition(" ")
        return imported, eval(said, {"Architecture": Architecture})

    first, second = ask(), ask()
    assert (first[0], second[0]) == ("True", "False")
    assert first[1] == second[1] == _described(config)
    assert second[1].shapes
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kept.write_bytes(kept.read_bytes()[:-9])
    assert ask() == first, "what is damaged is read off anew"
    assert ask() == second


def test_facts_are_found_where_none_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    config = tiny_gpt2().config.to_dict() | {"architectures": ["GPT2LMHeadModel"], "note": str(tmp_path)}
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(place))
        config["place"] = str(place)  # another config, which this process has not seen either
        assert describe(config).tied == {"lm_head.weight": "transformer.wte.weight"}


# --- experts that are full checkpoints


def assert_deltas(expert: Expert, base: Path, expected: dict[str, Tensor], rtol: float = 1e-5) -> int:
    """Compare the delta at every tensor of the base to a merged weight minus the base's; return how many there are."""
    reference = checkpoint(base)
    found = 0
    for key in reference.headers:
        origin = reference.tensor(key).float()
        delta = expert.delta(key, origin)
        change = expected[key].double() - origin.double()
        if delta is None:
            assert not change.abs().max() > 1e-6, f"the expert changes {key}"
            continue
        assert delta.shape == origin.shape, key
        found += 1
        # The merged weight is rounded to float32, its difference from the base by as much.
        atol = 1e-6 * float(expected[key].abs().max())
        torch.testing.assert_close({key: delta.dense().double()}, {key: change}, rtol=rtol, atol=atol)
    return found


def test_classifier_is_a_delta_of_the_bare_body(tmp_path: Path) -> None:
    body = tiny_bert_body(tmp_path / "base", seed=1)
    model = tiny_bert_classifier(seed=5)
    model.bert.load_state_dict(perturbed(body, 2).state_dict())
    save(model, tmp_path / "expert")
    expert = expert_of(tmp_path / "expert", tmp_path / "base")
    assert expert.names == {name: f"bert.{name}" for name in checkpoint(tmp_path / "base").headers}
    assert sorted(expert.extra) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(expert.whole_tensor("classifier.bias"), model.classifier.bias)
    assert assert_deltas(expert, tmp_path / "base", state(model.bert)) == len(expert.names)
    assert expert.delta("no.such.weight", torch.zeros(1)) is None
    assert not expert.holds("no.such.weight")
    assert (expert.kind, expert.auto_class) == ("full checkpoint", "BertForSequenceClassification")


def test_checkpoint_with_gamma_and_beta_is_read(tmp_path: Path) -> None:
    body = tiny_bert_body(tmp_path / "base", seed=1)
    moved = state(perturbed(body, 2))
    save(body, tmp_path / "old")
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in moved.items()
    }
    save_file(old, tmp_path / "old" / "model.safetensors")
    expert = expert_of(tmp_path / "old", tmp_path / "base")
    assert expert.names["embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert assert_deltas(expert, tmp_path / "base", moved) == len(moved)
    assert expert.extra == []


@pytest.mark.parametrize("base_stores", [True, False])
@pytest.mark.parametrize("expert_stores", [True, False])
def test_tied_heads_stored_or_not(tmp_path: Path, base_stores: bool, expert_stores: bool) -> None:
    base = tiny_gpt2(seed=1)
    moved = perturbed(base, 2)
    for name, model, stores in (("base", base, base_stores), ("expert", moved, expert_stores)):
        save(model, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        assert "lm_head.weight" not in load_file(file), "transformers stores a tied weight once"
        if stores:
            save_file(state(model), file, metadata={"format": "pt"})
    expert = expert_of(tmp_path / "expert", tmp_path / "base")
    assert ("lm_head.weight" in expert.names) == base_stores
    assert expert.extra == []
    count = assert_deltas(expert, tmp_path / "base", state(moved))
    assert count == len(checkpoint(tmp_path / "base").headers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_delta_of_half_precision_is_exact_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_llama(tmp_path / "base", seed=1)
    moved = perturbed(base, 2).to(dtype)
    save(moved, tmp_path / "expert")
    expert, reference = expert_of(tmp_path / "expert", tmp_path / "base"), checkpoint(tmp_path / "base")
    for key, parameter in moved.named_parameters():
        origin = reference.tensor(key)
        delta = expert.delta(key, origin)
        assert isinstance(delta, DenseDelta)
        assert delta.value.dtype == torch.float32
        assert torch.equal(delta.value, parameter.detach().float() - origin)


@pytest.mark.parametrize("family", FACTORIES)
def test_load_expert_gives_the_saved_model(tmp_path: Path, family: str) -> None:
    model = FACTORIES[family](tmp_path / "expert", seed=2)
    loaded = load_expert(expert_of(tmp_path / "expert"))
    assert type(loaded) is type(model)
    assert not loaded.training
    for name, tensor in state(model).items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert load_expert(expert_of(tmp_path / "expert"), dtype="bfloat16").dtype == torch.bfloat16


# --- LoRA


MIXTURE = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 32},
}


def tiny_mixtral(folder: Path | None = None, seed: int = 0) -> Any:
    """Return a language model whose experts are stacked in the model, and stored one by one."""
    return _made("MixtralForCausalLM", "MixtralConfig", MIXTURE, folder, seed, tiny_tokenizer("llama"))


def tiny_nomic_bert(folder: Path | None = None, seed: int = 0) -> Any:
    """Return a classifier whose query, key and value are stored as one weight."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = shape | {"max_position_embeddings": 32, "num_labels": 2}
    name = "NomicBertForSequenceClassification"
    return _made(name, "NomicBertConfig", settings, folder, seed, tiny_tokenizer("bert"))


def tiny_gpt_oss(folder: Path | None = None, seed: int = 0) -> Any:
    """Return a language model whose experts are stacked ``[expert, in, out]``."""
    own = {"head_dim": 4, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    return _made("GptOssForCausalLM", "GptOssConfig", MIXTURE | own, folder, seed, tiny_tokenizer("llama"))


def tiny_resnet(folder: Path | None = None, seed: int = 0) -> Any:
    """Return a classifier of images with convolutions of 7 × 7, 3 × 3 and 1 × 1."""
    settings = {
        **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "bottleneck"},
        **{"num_labels": 3, "vocab_size": None, "pad_token_id": None},
    }
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return _made("ResNetForImageClassification", "ResNetConfig", settings, folder, seed, processor)


def tiny_whisper(folder: Path | None = None, seed: int = 0) -> Any:
    """Return a model of speech with convolutions in one dimension."""
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    settings = {
        **{"d_model": 16, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        **{"decoder_start_token_id": 0, "bos_token_id": 4, "eos_token_id": 5},
    }
    processor = tiny_tokenizer("t5")
    return _made("WhisperForConditionalGeneration", "WhisperConfig", settings | sides, folder, seed, processor)


LORA: dict[str, tuple[Any, dict[str, Any], int]] = {
    # name: base, adapter, number of low-rank deltas
    "plain": (tiny_bert_body, {}, 4),
    "alpha": (tiny_bert_body, {"r": 3, "alpha": 7}, 4),
    "rsLoRA": (tiny_bert_body, {"r": 3, "alpha": 7, "rslora": True}, 4),
    "rank pattern": (tiny_bert_body, {"rank_pattern": {"query": 2, "layer.1.attention.self.value": 5}}, 4),
    "alpha pattern": (
        tiny_bert_body,
        {"alpha_pattern": {"value": 3, r"encoder\.layer\.0\.attention\.self\.query": 5}},
        4,
    ),
    "alpha pattern, first that matches": (tiny_bert_body, {"alpha_pattern": {"layer.0.*query": 3, "query": 32}}, 4),
    "alpha pattern is no part of a name": (tiny_bert_body, {"alpha_pattern": {"uery": 3, "attention": 5, "val": 9}}, 4),
    "alpha pattern from the start": (
        tiny_bert_body,
        {"alpha_pattern": {"^encoder.layer.0.attention.self.query": 3}, "task_type": "FEATURE_EXTRACTION"},
        4,
    ),
    "both patterns and rsLoRA": (
        tiny_bert_body,
        {"alpha_pattern": {"value": 3}, "rank_pattern": {"value": 2, "query": 7}, "rslora": True},
        4,
    ),
    "one layer": (tiny_bert_body, {"layers_to_transform": [1]}, 2),
    "every linear module": (tiny_bert_body, {"target_modules": "all-linear"}, 13),
    "body": (tiny_bert_body, {"task_type": "FEATURE_EXTRACTION"}, 4),
    "base with a head": (tiny_bert_classifier, {"task_type": "SEQ_CLS"}, 4),
    "bias": (tiny_bert_body, {"bias": "lora_only"}, 4),
    "all biases": (tiny_bert_body, {"bias": "all"}, 4),
    "modules to save": (
        tiny_bert_body,
        {"task_type": "FEATURE_EXTRACTION", "modules_to_save": ["pooler", "word_embeddings"]},
        4,
    ),
    "embedding": (tiny_bert_body, {"target_modules": ["word_embeddings", "query"]}, 3),
    "embedding, rsLoRA": (tiny_bert_body, {"target_modules": ["position_embeddings"], "rslora": True, "r": 3}, 1),
    "llama": (tiny_llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, 14),
    "llama with head": (tiny_llama, {"target_modules": ["k_proj", "lm_head"], "task_type": "CAUSAL_LM"}, 3),
    "llama with saved head": (
        tiny_llama,
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "task_type": "CAUSAL_LM"},
        2,
    ),
    "llama by parameter": (
        tiny_llama,
        {"target_modules": [], "target_parameters": ["q_proj.weight"], "task_type": "CAUSAL_LM"},
        2,
    ),
    "experts": (tiny_mixtral, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, 2 * (4 + 1 + 3 * 3)),
    "second matrix of the experts": (
        tiny_mixtral,
        {"target_modules": ["k_proj"], "target_parameters": ["down_proj"], "task_type": "CAUSAL_LM", "rslora": True},
        2 * (1 + 3),
    ),
    "weights stored as one": (
        tiny_nomic_bert,
        {"target_modules": "all-linear", "rank_pattern": {"v_proj": 2}},
        2 * 5 + 1,
    ),
    "two of three weights stored as one": (
        tiny_nomic_bert,
        {"target_modules": ["q_proj", "v_proj"], "rslora": True},
        2,
    ),
    "t5": (tiny_t5, {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}, 16),
    "vit": (tiny_vit, {"target_modules": "all-linear", "task_type": None, "modules_to_save": ["classifier"]}, 12),
    "Conv1D": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True},
        8,
    ),
    "Conv1D, set by PEFT": (tiny_gpt2, {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}, 2),
    "Conv1D and embedding": (
        tiny_gpt2,
        {"target_modules": ["attn.c_proj", "wpe"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True},
        3,
    ),
    "Conv1D beside Linear": (
        tiny_gpt2,
        {"target_modules": ["attn.c_proj", "lm_head"], "task_type": "CAUSAL_LM", "tie_word_embeddings": False},
        3,
    ),
}


@pytest.mark.parametrize("name", LORA)
def test_lora_deltas_are_pefts_merged_weights_minus_the_base(tmp_path: Path, name: str) -> None:
    factory, options, count = LORA[name]
    options = dict(options)
    shape = {"tie_word_embeddings": False} if options.pop("tie_word_embeddings", True) is False else {}
    factory(tmp_path / "base", seed=1, **shape)
    model = lora_adapter(tmp_path / "base", tmp_path / "adapter", seed=2, **options)
    merged = merged_lora(model.double())
    save(merged, tmp_path / "merged")
    merged_names = expert_of(tmp_path / "merged", tmp_path / "base")
    expected = {key: merged_names.whole_tensor(own) for key, own in merged_names.names.items()}
    expert = expert_of(tmp_path / "adapter", tmp_path / "base")
    assert expert.adapter is not None
    assert len(expert.adapter.changed) == count
    assert set(expert.adapter.changed) <= set(expert.names.values()), "every factor has its weight in the base"
    changed = assert_deltas(expert, tmp_path / "base", expected)
    assert changed >= count
    for key, own in expert.names.items():
        origin = checkpoint(tmp_path / "base").tensor(key)
        low_rank = isinstance(expert.delta(key, origin), LowRankDelta)
        assert low_rank == (own in expert.adapter.changed)
        assert expert.shape(own) == tuple(origin.shape)
        if low_rank:
            assert expert.delta(key, origin).dense().abs().max() > 1e-3, "the adapter has an effect"
    assert expert.adapter.base == str(tmp_path / "base")
    ranks = [expert.adapter.delta(own).A.shape[-2] for own in expert.adapter.changed]
    assert expert.kind == f"LoRA adapter (rank {max(ranks)})"
    for own in expert.extra:
        assert torch.equal(
            expert.whole_tensor(own), model.base_model.model.state_dict()[saved_name(model, own)].float()
        )


def saved_name(model: Any, own: str) -> str:
    module, _, kind = own.rpartition(".")
    in_peft = f"{module}.modules_to_save.default.{kind}"
    return in_peft if in_peft in model.base_model.model.state_dict() else own


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_load_expert_merges_an_adapter_as_peft_does(tmp_path: Path, family: str) -> None:
    factory, options = {
        "bert": (tiny_bert_body, {"labels": 3}),
        "gpt2": (tiny_gpt2, {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
        "llama": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
        "vit": (tiny_vit, {"target_modules": "all-linear", "task_type": None, "modules_to_save": ["classifier"]}),
    }[family]
    factory(tmp_path / "base", seed=1)
    model = merged_lora(lora_adapter(tmp_path / "base", tmp_path / "adapter", seed=2, **options))
    loaded = load_expert(expert_of(tmp_path / "adapter"))
    assert type(loaded) is type(model)
    for name, tensor in state(model).items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    if family == "bert":
        assert loaded.config.num_labels == 3
    factory(tmp_path / "other", seed=1, **({"n_embd": 24} if family == "gpt2" else {"hidden_size": 24}))
    with pytest.raises(IncompatibleExperts, match=r"'.*adapter' does not fit its base"):
        load_expert(expert_of(tmp_path / "adapter"), open_source(tmp_path / "other"))


def test_bfloat16_factors_are_multiplied_in_float32(tmp_path: Path) -> None:
    tiny_bert_body(tmp_path / "base", seed=1)
    lora_adapter(tmp_path / "base", tmp_path / "adapter", seed=2)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    rough = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(rough, file)
    expert = expert_of(tmp_path / "adapter", tmp_path / "base")
    key = "encoder.layer.0.attention.self.query.weight"
    delta = expert.delta(key, torch.zeros(16, 16))
    prefix = "base_model.model.bert.encoder.layer.0.attention.self.query.lora"
    expected = 2 * rough[f"{prefix}_B.weight"].float() @ rough[f"{prefix}_A.weight"].float()
    assert delta.dense().dtype == torch.float32
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-6, atol=1e-8)


def option(**content: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder / "adapter_config.json", lambda config: config | content)


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)

    return rewrite


QUERY = "base_model.model.encoder.layer.0.attention.self.query"
UNMERGED = "merge_and_unload"
STRANGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "QALoRA": (option(use_qalora=True), "use_qalora.*Leave it out"),
    "aLoRA": (option(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens.*Leave it out"),
    "repeated layers": (option(layer_replication=[[0, 2], [1, 2]]), "layer_replication.*Leave it out"),
    "prefix": (option(peft_type="PREFIX_TUNING"), "a PREFIX_TUNING adapter: it is a prefix.*Leave it out"),
    "LoRA's tensors called IA3": (option(peft_type="IA3"), f"lora_[AB].*is none.*{UNMERGED}"),
    "of no type": (option(peft_type=None), "names no peft_type"),
    "a type that is no text": (option(peft_type=3), "peft_type"),
    "a DoRA vector": (
        tensors(lambda t: t | {f"{QUERY}.lora_magnitude_vector": torch.ones(16)}),
        f"lora_magnitude_vector.*{UNMERGED}",
    ),
    "an unknown tensor": (tensors(lambda t: t | {f"{QUERY}.oft_r": torch.ones(2)}), f"query.oft_r.*{UNMERGED}"),
    "trained tokens": (
        tensors(lambda t: t | {"base_model.model.embed.trainable_tokens_delta": torch.ones(2, 2)}),
        f"trainable_tokens_delta.*{UNMERGED}",
    ),
    "a bias of B": (tensors(lambda t: t | {f"{QUERY}.lora_B.bias": torch.ones(16)}), f"lora_B.bias.*{UNMERGED}"),
    "no A": (
        tensors(lambda t: {name: tensor for name, tensor in t.items() if name != f"{QUERY}.lora_A.weight"}),
        r"self\.query' has only LoRA factor B",
    ),
    "ranks that differ": (
        tensors(lambda t: t | {f"{QUERY}.lora_A.weight": torch.ones(3, 16)}),
        r"B \(16, 4\) and A \(3, 16\)",
    ),
    "half a convolution": (
        tensors(lambda t: t | {f"{QUERY}.lora_A.weight": torch.ones(4, 16, 1)}),
        "are no matrix product",
    ),
    "pickled": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"pickle \(adapter_model\.bin\).*run code",
    ),
    "cut short": (lambda folder: truncate(folder / "adapter_model.safetensors", -10), "cut short"),
    "settings malformed": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        r"adapter_config\.json is not",
    ),
}


@pytest.fixture(scope="module")
def sound_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    tiny_bert_body(root / "base", seed=1)
    lora_adapter(root / "base", root / "adapter", seed=2, task_type="FEATURE_EXTRACTION")
    return root / "adapter"


@pytest.mark.parametrize("name", STRANGE)
def test_adapter_that_is_no_low_rank_delta_is_refused(sound_adapter: Path, tmp_path: Path, name: str) -> None:
    spoil, told = STRANGE[name]
    folder = tmp_path / "strange"
    folder.mkdir()
    for path in sound_adapter.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    assert isinstance(open_adapter(open_source(folder)), LoraAdapter)
    spoil(folder)
    with pytest.raises(CheckpointError, match=f"(?s){told}") as caught:
        open_adapter(open_source(folder))
    assert "strange" in str(caught.value)


# --- writing


MIXED = {
    "a": torch.linspace(-1, 1, 12).reshape(3, 4),
    "flags": torch.tensor([True, False, True]),
    "b": torch.linspace(-1, 1, 10).to(torch.bfloat16),
    "ids": torch.arange(5).expand(1, 5),
    "half": torch.linspace(-1, 1, 7).to(torch.float16).reshape(7, 1),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "double": torch.linspace(-1, 1, 3, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "none": torch.zeros(0, 4),
    "view": torch.arange(12, dtype=torch.int32).reshape(3, 4).T,
    "name with ünïcode": torch.tensor([1], dtype=torch.int16),
}


def write(folder: Path, content: dict[str, Tensor], shard: int, **metadata: str) -> CheckpointWriter:
    folder.mkdir(exist_ok=True)
    layout = {name: TensorHeader(DTYPE_NAMES[t.dtype], tuple(t.shape), "") for name, t in content.items()}
    with CheckpointWriter(folder, layout, shard, metadata) as writer:
        for name in writer.order:
            writer.write(name, content[name])
    return writer


@pytest.mark.parametrize("shard", [1, 30, 64, 10**9])
def test_writer_round_trip(tmp_path: Path, shard: int) -> None:
    writer = write(tmp_path / "out", MIXED, shard, origin="here")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert tuple(files) == writer.files
    assert sorted(writer.order) == sorted(MIXED)
    assert (len(files) == 1) == (shard == 10**9)
    read = stored(tmp_path / "out")
    assert read.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    found = checkpoint(tmp_path / "out")
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in MIXED.items())
    for name in files:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "origin": "here"}
            held = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
            assert held <= shard or len(file.keys()) == 1 or any(not file.get_tensor(k).numel() for k in file.keys())  # noqa: SIM118
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in MIXED.values())
        assert content["weight_map"] == {name: found.headers[name].file for name in MIXED}


def test_writer_casts_to_its_layout(tmp_path: Path) -> None:
    layout = {"w": TensorHeader("BF16", (2, 2), ""), "n": TensorHeader("I64", (1,), "")}
    weight = torch.tensor([[1.001, 2.0], [3.0, -4.0]], requires_grad=True)
    with CheckpointWriter(tmp_path, layout, 10**6, {}) as writer:
        assert writer.order == ("n", "w"), "wider entries come first"
        writer.write("n", torch.tensor([7], dtype=torch.int32))
        writer.write("w", weight.T)
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["w"], weight.detach().T.to(torch.bfloat16))
    assert read["n"].tolist() == [7]


def write_all(folder: Path, layout: dict[str, TensorHeader], tensors: list[tuple[str, Tensor]]) -> None:
    with CheckpointWriter(folder, layout, 99, {}) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([("c", 3)], r"'c' \(3,\) is not of the layout"),
        ([("a", 3)], r"'a' \(3,\) is not of the layout"),
        ([("a", 2), ("a", 2)], "was written before"),
        ([("a", 2)], "only 1 of 2 tensors"),
    ],
)
def test_writer_refuses_what_is_not_of_its_layout_or_missing(tmp_path: Path, tensors, said) -> None:
    layout = {"a": TensorHeader("F32", (2,), ""), "b": TensorHeader("F32", (3,), "")}
    with pytest.raises(RuntimeError, match=said):
        write_all(tmp_path, layout, [(name, torch.zeros(size)) for name, size in tensors])
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_writer_takes_tensors_in_any_order_and_leaves_out_what_is_there(tmp_path: Path) -> None:
    layout = {name: TensorHeader("F32", (2,), "") for name in "abcd"}
    with CheckpointWriter(tmp_path, layout, 16, {}, there=["model-00002-of-00002.safetensors"]) as writer:
        assert writer.order == ("a", "b")
        for value, name in enumerate("ba"):
            writer.write(name, torch.full((2,), float(value)))
    read = load_file(tmp_path / "model-00001-of-00002.safetensors")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"a": [1, 1], "b": [0, 0]}
    assert not list(tmp_path.glob("*.part"))


def test_shards_keep_the_order_and_the_limit() -> None:
    layout = {f"t{i}": TensorHeader("F32", (size,), "") for i, size in enumerate((1, 2, 9, 1, 1, 1))}
    assert shard_layout(layout, 12) == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"]]


@pytest.mark.parametrize("family", FACTORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_what_is_written(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = FACTORIES[family](seed=3).to(dtype)
    source = save(model, tmp_path / "source")
    write(tmp_path / "copy", stored(source), 5000)
    (tmp_path / "copy" / "config.json").write_text((source / "config.json").read_text())
    loaded, info = type(model).from_pretrained(tmp_path / "copy", dtype="auto", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    for name, tensor in state(model).items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


SIZES = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "1.5kb": 1500, "7": 7, "12B": 12, 99: 99}


@pytest.mark.parametrize("text", SIZES)
def test_parse_size(text: str | int) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "much", "GB", "1.5"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"convert|invalid"):
        parse_size(text)
