"""Files that a model is used with beside weights and config: tokenizer, processor, generation config, pooling of sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mats_hub.errors import CheckpointError
from mats_hub.source import Source

COMPANION_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.txt", "vocab.json", "vocab-src.json", "vocab-tgt.json", "entity_vocab.json", "merges.txt", "bpe.codes"),
    *("spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("tokenizer.model", "source.spm", "target.spm", "dict.txt", "normalizer.json", "prophetnet.tokenizer"),
    *("emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "feature_extractor_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
)
"""Names that transformers looks for; all are taken from one source."""

SENTENCE_MODULES = "modules.json"
"""In it sentence-transformers lists what follows a model's body, each module with a folder of its own."""

SENTENCE_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json")


def companions_of(source: Source) -> list[str]:
    """Return which of them a source has; a generation config alone is none."""
    names = [name for name in COMPANION_FILES if name in source.sizes]
    return [] if names == ["generation_config.json"] else names


def copy_companions(sources: Sequence[Source], experts: Sequence[Source], folder: Path) -> list[str]:
    """Copy them from the first source that has some, what sentence-transformers needs from the experts; return notes."""
    notes = _copy_sentence_modules(experts, folder)
    for source in sources:
        if names := companions_of(source):
            for name in names:
                _copy(source, name, folder)
            return notes
    return ["no tokenizer or processor was found; name a model that has one with 'tokenizer' (--tokenizer)", *notes]


def _copy_sentence_modules(experts: Sequence[Source], folder: Path) -> list[str]:
    """Copy what sentence-transformers does with a body's output, where all experts have it; return notes.

    Only modules without weights are copied, as pooling and normalizing; others would have to be merged.
    """
    if not all(SENTENCE_MODULES in source.sizes for source in experts):
        return []
    first, left_out = experts[0], "sentence-transformers' modules are left out, the result is the body alone: "
    try:
        modules = [_modules(source) for source in experts]
        insides = tuple(f"{name}/" for name in modules[0])
        weights = [name for name in first.sizes if name.startswith(insides) and not name.endswith((".json", ".md"))]
        if weights:
            return [f"{left_out}{weights[0]!r} is not merged"]
        for name in (*SENTENCE_FILES, *(f"{inside}config.json" for inside in insides), SENTENCE_MODULES):
            if name in first.sizes:
                _copy(first, name, folder)
    except CheckpointError:  # it names a folder of this machine, which notes do not
        return [f"{left_out}what {SENTENCE_MODULES} lists cannot be read"]
    others = ", ".join(e.public_spec for e, found in zip(experts, modules, strict=True) if found != modules[0])
    return [f"sentence-transformers' modules of {others} are others than those that are taken"] if others else []


def _modules(source: Source) -> dict[str, dict[str, Any]]:
    """Return the folders of sentence-transformers' modules behind the body, and the config of each.

    Raises:
        CheckpointError: the list, or a config, is none.

    """
    try:
        listed = [module["path"] for module in json.loads(source.path(SENTENCE_MODULES).read_text(encoding="utf-8"))]
        folders = [path for path in listed if path]
        if not all(path.replace("_", "").isalnum() for path in folders):
            raise ValueError("a folder's name")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{source.spec!r}: {SENTENCE_MODULES} does not list modules ({error}); fetch the model again"
        ) from None
    return {path: source.json(f"{path}/config.json") for path in folders}


def _copy(source: Source, name: str, folder: Path) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.json(name) if name.endswith("_config.json") else {}
    if content:
        public = {key: value for key, value in content.items() if key not in ("name_or_path", "_name_or_path")}
        target.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source.path(name), target)
