"""What a merged model is used with beside its weights: files of tokenizers of all kinds, and of models of sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest

import mats_hub
from mats_hub.card import front_matter

BODY, POOLING, NORMALIZE = (
    {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
    for n, (path, name) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))
)
CARD = "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n---\n# of sentences\n"


@pytest.fixture
def bodies(tmp_path: Path) -> list[Path]:
    """Save a base and two experts, bodies without heads."""
    for seed, name in enumerate(("base", "one", "two")):
        models.tiny_bert_body(tmp_path / name, seed=seed)
    return [tmp_path / name for name in ("base", "one", "two")]


def of_sentences(folder: Path, modules: list[dict[str, Any]] | None = None, **pooling: Any) -> None:
    """Make a folder what sentence-transformers saves."""
    (folder / "modules.json").write_text(json.dumps(modules or [BODY, POOLING, NORMALIZE]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "the film "}}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True} | pooling))
    (folder / "README.md").write_text(CARD)


def merge(bodies: list[Path], **options: Any) -> mats_hub.MergedModel:
    return mats_hub.merge(list(map(str, bodies[1:])), base=str(bodies[0]), method="average", **options)


@pytest.mark.parametrize(
    "name", ["spm.model", "source.spm", "bpe.codes", "normalizer.json", "tekken.json", "video_preprocessor_config.json"]
)
def test_the_files_of_every_kind_of_tokenizer_and_processor_come_along(bodies, name):
    """DeBERTa's, Marian's, PhoBERT's, Whisper's and Mistral's tokenizers, Qwen-VL's processor."""
    content = b'{"size": 3}' if name.endswith(".json") else b"\x00\xff"
    (bodies[0] / name).write_bytes(content)
    merged = merge(bodies)
    written = (merged.folder / name).read_bytes()
    assert json.loads(written) == json.loads(content) if name.endswith("_config.json") else written == content


def test_models_of_sentences_stay_models_of_sentences(bodies):
    for folder in bodies[1:]:
        of_sentences(folder)
    merged = merge(bodies)
    names = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")
    for name in names:
        assert json.loads((merged.folder / name).read_text()) == json.loads((bodies[1] / name).read_text())
    assert not any("sentence-transformers" in note for note in merged.report.notes)
    assert front_matter(merged.report)["library_name"] == "sentence-transformers"
    assert front_matter(merged.report)["pipeline_tag"] == "sentence-similarity"
    again = merge([bodies[0], merged.folder, bodies[2]])
    assert (again.folder / "1_Pooling" / "config.json").exists()


def test_other_pooling_is_told_and_modules_of_some_experts_alone_say_nothing(bodies):
    of_sentences(bodies[1])
    assert not (merge(bodies).folder / "modules.json").exists()
    assert front_matter(merge(bodies).report)["library_name"] == "transformers"
    of_sentences(bodies[2], pooling_mode_cls_token=True)
    notes = merge(bodies).report.notes
    assert [note for note in notes if "modules of two are others than those that are taken" in note]


def test_modules_with_weights_are_left_out_and_named(bodies):
    dense = POOLING | {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    for folder in bodies[1:]:
        of_sentences(folder, [BODY, POOLING, dense])
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    merged = merge(bodies)
    assert not (merged.folder / "modules.json").exists()
    assert [note for note in merged.report.notes if "'2_Dense/model.safetensors' is not merged" in note]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 1}', '[{"path": "../out"}]', '[{"path": 3}]', '[{"no": ""}]', "null"]
)
def test_a_list_of_modules_that_is_none_is_left_out_and_told(bodies, text):
    for folder in bodies[1:]:
        of_sentences(folder)
        (folder / "modules.json").write_text(text)
    merged = merge(bodies)
    assert [note for note in merged.report.notes if "left out" in note and "modules.json lists cannot be read" in note]
    assert str(bodies[0].parent) not in (merged.folder / "README.md").read_text()
    assert not (merged.folder / "modules.json").exists()
    assert not (merged.folder / "1_Pooling").exists()
