"""What a merged model is used with beside its weights: files of tokenizers of all kinds, and of models of sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
from transformers import AutoTokenizer

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


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def taught(folder: Path, seed: int, template: str = TEMPLATE, generation: bool = True) -> None:
    """Save a language model that was taught to talk in a template of its own."""
    models.tiny_llama(folder, seed=seed)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": "[SEP]"}))
    (folder / "chat_template.jinja").write_text(template)
    if not generation:
        (folder / "generation_config.json").unlink()


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_chat_models_of_a_base_that_does_not_chat_stay_chat_models(tmp_path, adapters):
    models.tiny_llama(tmp_path / "base", seed=0)
    experts = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(experts, start=1):
        taught(folder, seed, generation=seed == 2)
        if adapters:
            models.lora_adapter(tmp_path / "base", tmp_path / f"lora{seed}", seed=seed, target_modules=["q_proj"])
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                (tmp_path / f"lora{seed}" / name).write_bytes((folder / name).read_bytes())
    used = [tmp_path / f"lora{seed}" for seed in (1, 2)] if adapters else experts
    options = {"base": tmp_path / "base", "method": "average"}
    merged = mats_hub.merge(used, **options)
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "[SEP]")
    assert (merged.folder / "generation_config.json").is_file() == (not adapters)
    said = "the experts', which agree on another chat template and end of text than the base"
    assert any(said in note for note in merged.report.notes)

    named = mats_hub.merge(used, tokenizer=tmp_path / "base", **options)
    base = AutoTokenizer.from_pretrained(named.folder)
    assert (base.chat_template, base.eos_token) == (None, "</s>")
    (used[1] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    merged = mats_hub.merge(used, **options)
    assert AutoTokenizer.from_pretrained(merged.folder).chat_template is None
    said = f"the chat template and end of text of '{used[0].name}' and '{used[1].name}' differs"
    assert any(said in note and "--tokenizer" in note for note in merged.report.notes)


def test_of_a_base_without_a_tokenizer_nothing_is_said(tmp_path):
    models.tiny_llama(tmp_path / "base", seed=0)
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    for seed, name in enumerate(("one", "two"), start=1):
        taught(tmp_path / name, seed)
    merged = mats_hub.merge([tmp_path / "one", tmp_path / "two"], base=tmp_path / "base", method="average")
    assert (merged.folder / "chat_template.jinja").read_text() == TEMPLATE
    assert not merged.report.notes


def test_a_tokenizer_with_more_tokens_than_the_model_is_not_taken(tmp_path):
    models.tiny_llama(tmp_path / "base", seed=0)
    for seed, name in enumerate(("one", "two"), start=1):
        taught(tmp_path / name, seed)
        content = json.loads((tmp_path / name / "tokenizer.json").read_text())
        content["added_tokens"].append({**content["added_tokens"][0], "id": 99, "content": "<|end|>"})
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    merged = mats_hub.merge([tmp_path / "one", tmp_path / "two"], base=tmp_path / "base", method="average")
    assert not (merged.folder / "chat_template.jinja").exists()
    assert any("whose tokenizer is kept" in note for note in merged.report.notes)


def test_a_tokenizer_that_is_named_is_there_before_the_merge_and_pinned(tmp_path, bodies):
    with pytest.raises(mats_hub.MatsError, match=r"1 problem.*\n.*'no/where/x y' is neither a folder"):
        merge(bodies, tokenizer="no/where/x y")
    merged = merge(bodies, tokenizer=bodies[1])
    assert merged.report.recipe["tokenizer"] == "one"
