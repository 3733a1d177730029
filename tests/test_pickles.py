"""Models stored as pickles only: made into safetensors on demand, with the same tensors, and without running their code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import family as families
import models
import pytest
import torch
from safetensors.torch import load_file

import mats_hub
from mats_hub.cli import main
from mats_hub.errors import CheckpointError, MatsError, OutputError, PlanError
from mats_hub.source import open_source


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=families.EXPERT_CARD)


def as_pickle(source: str | Path, folder: Path, shards: int = 1, old: bool = False) -> Path:
    """Copy a model, with its weights as `torch.save` writes them, in as many files, before torch 1.6 or since."""
    shutil.copytree(source, folder)
    [weights] = folder.glob("*model.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    stem = weights.stem if weights.stem.startswith("adapter") else "pytorch_model"
    if shards == 1:
        torch.save(tensors, folder / f"{stem}.bin", _use_new_zipfile_serialization=not old)
        return folder
    names = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in names if names[name] == file}, folder / file)
    (folder / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("shards", "old"), [(1, False), (1, True), (3, False)])
def test_a_folder_gets_safetensors_beside_its_pickles(family, tmp_path, shards, old):
    folder = as_pickle(family.experts[0], tmp_path / "alpha", shards, old)
    with pytest.raises(PlanError, match=f"mats-hub convert {folder}"):
        mats_hub.make_plan(mats_hub.Recipe.build([str(folder)], method="average")).raise_problems()
    before = {path.name for path in folder.iterdir()}
    assert mats_hub.convert(folder) == folder
    assert_same(weights_of(folder), load_file(Path(family.experts[0]) / "model.safetensors"))
    added = {path.name for path in folder.iterdir()} - before
    assert len(added) == (1 if shards == 1 else shards + 1)
    assert all("safetensors" in name for name in added)
    experts = [str(folder), family.experts[1]]
    merged = mats_hub.merge(experts, base=family.base, method="average")
    expected = mats_hub.merge(family.experts[:2], base=family.base, method="average")
    assert_same(weights_of(merged.folder), weights_of(expected.folder))
    with pytest.raises(CheckpointError, match="safetensors already"):
        mats_hub.convert(folder)


def test_one_file_by_an_index_and_one_beside_an_index(family, tmp_path):
    expected = load_file(Path(family.base) / "model.safetensors")
    alone = as_pickle(family.base, tmp_path / "alone")
    index = {"weight_map": dict.fromkeys(expected, "pytorch_model-00001-of-00001.bin")}
    (alone / "pytorch_model.bin").rename(alone / "pytorch_model-00001-of-00001.bin")
    beside = as_pickle(family.base, tmp_path / "beside")
    for folder in (alone, beside):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        mats_hub.convert(folder)
        assert_same(weights_of(folder), expected)
        assert open_source(folder).weight_files


def test_an_adapter(family, tmp_path):
    models.lora_adapter(family.base, tmp_path / "lora", seed=1)
    folder = as_pickle(tmp_path / "lora", tmp_path / "pickled")
    mats_hub.convert(folder)
    assert_same(weights_of(folder), weights_of(tmp_path / "lora"))
    mats_hub.merge([str(folder), str(tmp_path / "lora")], base=family.base, method="average")


def test_tied_and_strided_tensors_are_stored_each(family, tmp_path):
    folder = as_pickle(family.base, tmp_path / "base")
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": whole, "tied": whole, "turned": whole.T, "part": whole[1:]}, folder / "pytorch_model.bin")
    mats_hub.convert(folder)
    found = weights_of(folder)
    assert_same(found, {"a": whole, "tied": whole, "turned": whole.T, "part": whole[1:]})


def test_an_expert_on_the_hub_is_converted_once_for_its_commit(hub, family, tmp_path, capsys):
    hub.add_user("alice")
    folder = as_pickle(family.experts[0], tmp_path / "alpha", shards=2)
    (folder / "training_args.bin").write_bytes(b"anything")
    hub.create("alice/alpha", {path.name: path.read_bytes() for path in folder.iterdir()})
    hub.create("alice/base", {path.name: path.read_bytes() for path in Path(family.base).iterdir()})
    assert main(["plan", "alice/alpha", "--base", "alice/base", "--method", "average"]) == 1
    assert "mats-hub convert alice/alpha" in capsys.readouterr().out
    assert main(["convert", "alice/alpha"]) == 0
    converted = mats_hub.convert("alice/alpha")
    assert str(converted) in capsys.readouterr().out
    assert not (converted / "training_args.bin").exists()
    merged = mats_hub.merge(["alice/alpha"], base="alice/base", method="average")
    [facts] = merged.report.experts
    assert (facts["model"], facts["license"]) == (open_source("alice/alpha").public_spec, "apache-2.0")
    again = mats_hub.merge([family.experts[0]], base=family.base, method="average")
    assert_same(weights_of(merged.folder), weights_of(again.folder))
    assert mats_hub.load("alice/alpha").config.num_labels == 2
    hub.commit("alice/alpha", {"README.md": b"another commit"})
    with pytest.raises(PlanError, match="mats-hub convert alice/alpha"):
        mats_hub.merge(["alice/alpha"], base="alice/base", method="average")


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


REFUSED = {
    # name: what the pickle holds, what the message tells
    "code": ({"a": torch.ones(2), "b": Harm()}, "holds more than tensors.*nothing of it was"),
    "a training's state": ({"model": {"a": torch.ones(2)}, "epoch": 3}, "entry 'model' is no tensor"),
    "a list": ([torch.ones(2)], "holds no tensors by name"),
    "numbers for names": ({1: torch.ones(2)}, "entry 1 is no tensor"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "entry 'a' is no tensor of a kind that is merged"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, "entry 'a' is no tensor of a kind that is merged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_refused_and_nothing_is_run(family, tmp_path, monkeypatch, name):
    content, told = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    folder = as_pickle(family.base, tmp_path / "base")
    torch.save(content, folder / "pytorch_model.bin")
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=f"(?s)base.*pytorch_model.bin.*{told}"):
        mats_hub.convert(folder)
    assert {path.name for path in folder.iterdir()} == before
    assert not Path("harmed").exists()


def test_damaged_pickles_are_refused(family, tmp_path):
    folder = as_pickle(family.base, tmp_path / "base")
    weights = folder / "pytorch_model.bin"
    whole = weights.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        spoilt = bytearray(whole)
        at = int(torch.randint(min(len(whole), 4096) if number % 2 else len(whole), (), generator=generator))
        if number % 4 == 3:
            del spoilt[at:]
        else:
            spoilt[at] ^= 0xFF
        weights.write_bytes(spoilt)
        try:
            mats_hub.convert(folder)
        except MatsError:
            assert not list(folder.glob("*.safetensors*"))
        else:  # a byte of a value
            (folder / "model.safetensors").unlink()
    weights.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="fetch it again"):
        mats_hub.convert(folder)


def test_indexes_that_do_not_fit_are_refused(family, tmp_path):
    folder = as_pickle(family.base, tmp_path / "base", shards=2)
    index = folder / "pytorch_model.bin.index.json"
    sound = json.loads(index.read_text())
    first = next(iter(sound["weight_map"]))
    for changed, told in (
        ({first: "../x.bin"}, r"names '\.\./x\.bin', which is not a plain file name"),
        ({first: "pytorch_model-9.bin"}, "names 'pytorch_model-9.bin', which is not there"),
        ({first: ["a.bin"]}, "no weight_map of file names"),
        ({"another": sound["weight_map"][first]}, "no file holds tensor 'another'"),
    ):
        index.write_text(json.dumps({"weight_map": sound["weight_map"] | changed}))
        with pytest.raises(CheckpointError, match=told):
            mats_hub.convert(folder)
    index.write_text(json.dumps(sound))
    both = sorted(folder.glob("pytorch_model-*.bin"))
    shutil.copyfile(both[0], both[1])
    with pytest.raises(CheckpointError, match="is in two files"):
        mats_hub.convert(folder)
    assert not list(folder.glob("*.safetensors*"))


def test_a_folder_without_pickles_or_room_is_named(family, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no pytorch_model\.bin; it holds: nothing"):
        mats_hub.convert(tmp_path / "empty")
    folder = as_pickle(family.base, tmp_path / "base")
    (folder / "model.safetensors").mkdir()
    (folder / "model.safetensors" / "x").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write safetensors of"):
        mats_hub.convert(folder)
