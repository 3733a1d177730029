"""Where a task's examples may lie."""

from __future__ import annotations

import importlib.util
import json
import wave
from functools import partial
from pathlib import Path

import datasets
import models
import pytest
import transformers

import mats_hub
from mats_hub.errors import SourceError, StatisticsError
from mats_hub.source import open_source
from mats_hub.statistics.dataset import Columns, load_dataset
from mats_hub.statistics.tasks import open_task
from mats_hub.suite import Suite

ROWS = [{"text": text, "label": index % 2} for index, text in enumerate(models.tiny_texts(6, 1))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save the same examples in a folder of files, by `save_to_disk`, and as images by class."""
    (tmp_path / "files").mkdir()
    for part, rows in (("train", ROWS), ("validation", ROWS[:4]), ("test", ROWS[:2])):
        (tmp_path / "files" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2))}).save_to_disk(tmp_path / "several")
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, image in enumerate(models.tiny_images(3)):
            image.save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path


def test_folders_are_opened_by_their_splits(folder):
    for place, split, count in (
        ("files", None, 4), ("files", "train", 6), ("saved", None, 6), ("several", "test", 2), ("images", None, 6)
    ):  # fmt: skip
        loaded, name, commit = load_dataset(folder / place, None, split)
        assert (len(loaded), name, commit) == (count, place, None)
    assert loaded.features["label"].names == ["cat", "dog"]
    with pytest.raises(SourceError, match=r"unknown split 'validation'. Known: train, test"):
        load_dataset(folder / "several")


def test_examples_in_memory(folder):
    assert load_dataset(ROWS)[0].to_list() == ROWS
    assert len(load_dataset(datasets.load_from_disk(folder / "several"), None, "test")[0]) == 2
    with pytest.raises(SourceError, match="has no end that is known"):
        load_dataset(datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(SourceError, match="no file or folder on this machine, and no Hub id"):
        load_dataset(folder / "nothing")


def test_a_model_of_images_is_measured_and_scored_on_a_folder_of_them(folder):
    names = {0: "Dog", 1: "Cat"}
    models.tiny_vit(folder / "model", labels=2, id2label=names, label2id={name: i for i, name in names.items()})
    found = mats_hub.compute_statistics(folder / "model", dataset=folder / "images", device="cpu")
    assert (found.provenance.dataset, found.provenance.examples) == ("images", 6)
    one_sided = mats_hub.load(folder / "model")
    one_sided.classifier.weight.data.zero_()
    one_sided.classifier.bias.data.copy_(one_sided.classifier.bias.data.new_tensor([0.0, 1.0]))
    dogs = sorted((folder / "images" / "dog").iterdir())
    dogs[0].unlink()
    score = mats_hub.evaluate(one_sided, dataset=folder / "images", processor=folder / "model")
    assert score == 3 / 5, "all are told to be cats, which the model numbers 1 and the folder 0"


def test_a_task_may_be_of_a_folder_beside_the_file_of_tasks(folder):
    (folder / "tasks.yaml").write_text(
        "alpha: {dataset: files}\nbeta: {dataset: files, validation: train, examples: 3}\n"
    )
    suite = Suite.load(folder / "tasks.yaml")
    assert [len(suite.data("alpha", part)) for part in ("validation", "test")] == [4, 2]
    assert len(suite.data("beta", "validation")) == 3
    assert suite.hub_id("alpha") is None
    assert Suite.from_mapping({"alpha": {"dataset": "nyu-mll/glue"}}).hub_id("alpha") == "nyu-mll/glue"


def test_sounds_in_files_are_heard_at_the_models_rate(tmp_path):
    for name, rate in (("a", 8000), ("b", 24000)):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        with wave.open(str(tmp_path / "sounds" / name / "0.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(b"\x00\x10\x00\xf0" * rate)  # two seconds
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": 2,
    }
    config = transformers.ASTConfig(**size, num_mel_bins=16, max_length=64, patch_size=8)
    transformers.ASTForAudioClassification(config).save_pretrained(tmp_path / "model")
    transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(tmp_path / "model")
    options = {"dataset": tmp_path / "sounds", "kind": "gram", "device": "cpu"}
    if importlib.util.find_spec("torchcodec") is None:
        with pytest.raises(SourceError, match="please install 'torchcodec'"):
            mats_hub.compute_statistics(tmp_path / "model", **options)
    else:
        assert mats_hub.compute_statistics(tmp_path / "model", **options).provenance.examples == 2


def test_a_damaged_image_is_an_error_that_numbers_it(folder):
    models.tiny_vit(folder / "model", labels=2)
    (folder / "images" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(StatisticsError, match="example 1 of the data set cannot be decoded: cannot identify image"):
        mats_hub.compute_statistics(folder / "model", dataset=folder / "images", kind="gram", device="cpu")


TEXT = [row["text"] for row in ROWS]
EXAMPLES = {
    "labels": (partial(models.tiny_bert_classifier, labels=3), {"text": TEXT, "label": [0, 1, 2, 0, 1, 2]}),
    "numbers": (
        partial(models.tiny_bert_classifier, labels=1, problem_type="regression"), {"text": TEXT, "label": [0.5] * 6},
    ),
    "completions": (models.tiny_llama, {"prompt": TEXT, "completion": TEXT}),
    "sequences": (models.tiny_t5, {"text": TEXT, "target": TEXT}),
    "images": (partial(models.tiny_vit, labels=3), {"image": models.tiny_images(6), "label": [0, 1, 2, 0, 1, 2]}),
}  # fmt: skip
JUNK = [None, 3, -7.5, "", "x", [], [None], [[3]], {"role": "x"}, [{"role": "assistant"}]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_junk_in_a_column_is_an_error_or_harmless(name, tmp_path):
    save, columns = EXAMPLES[name]
    save(tmp_path)
    config, files = transformers.AutoConfig.from_pretrained(tmp_path), [open_source(tmp_path)]
    for column in columns:
        refused = 0
        for junk in JUNK:
            rows = datasets.Dataset.from_dict({**columns, column: [junk] * 6})
            data = open_task(config.architectures[0], config, files, rows, Columns())
            data.sort_by_length()
            try:
                list(data.batches(3))
            except StatisticsError:
                refused += 1
        assert refused >= 5, f"{refused} of {len(JUNK)} values of {column} were refused"
