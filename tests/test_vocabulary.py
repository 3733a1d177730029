"""Experts with other vocabularies, tokenizers or configs: refused by name, or merged as the recipe says."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

import mats_hub
from mats_hub.architecture import describe
from mats_hub.errors import PlanError

SIZE = models.VOCABULARY
EMBEDDING = "model.embed_tokens.weight"


def save(model, folder: Path, family: str = "llama") -> str:
    models.save(model, folder, family)
    return str(folder)


@pytest.fixture
def experts(tmp_path):
    """Save a base, an expert with its vocabulary, and one with four tokens more."""
    base = models.tiny_llama()
    save(base, tmp_path / "base")
    same, wider = (models.perturbed(base, seed) for seed in (1, 2))
    with models.seeded(3):
        wider.resize_token_embeddings(SIZE + 4, mean_resizing=False)
    save(same, tmp_path / "same")
    save(wider, tmp_path / "wider")
    return [str(tmp_path / name) for name in ("same", "wider")], str(tmp_path / "base")


def plan_of(experts, base, **options):
    return mats_hub.make_plan(mats_hub.Recipe.build(experts, base=base, **{"method": "average", **options}))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (models.tiny_llama, {EMBEDDING, "lm_head.weight"}),
        (models.tiny_gpt2, {"transformer.wte.weight", "lm_head.weight"}),
        (
            models.tiny_t5,
            {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
        ),
        (models.tiny_bert_body, {"embeddings.word_embeddings.weight"}),
        (models.tiny_vit, set()),
    ],
)
def test_the_tensors_over_tokens_are_known(make, names):
    model = make()
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    assert describe(config).vocabulary == names


def test_another_vocabulary_is_refused_by_default_with_the_ways_out(experts):
    with pytest.raises(PlanError) as refused:
        mats_hub.merge(experts[0], base=experts[1], method="average")
    text = str(refused.value)
    assert f"expert 'wider' has another vocabulary than {experts[1]!r}: " in text
    assert f"has {SIZE + 4} rows, not {SIZE}" in text
    assert "--vocabulary base" in text
    assert "--vocabulary common" in text
    assert len(refused.value.problems) == 1


def test_the_base_s_embeddings_are_kept(experts):
    merged = mats_hub.merge(experts[0], base=experts[1], method="average", vocabulary="base")
    base, ours = (load_file(Path(folder, "model.safetensors")) for folder in (experts[1], merged.folder))
    assert torch.equal(ours[EMBEDDING], base[EMBEDDING])
    assert torch.equal(ours["lm_head.weight"], base["lm_head.weight"])
    assert not torch.equal(ours["model.norm.weight"], base["model.norm.weight"])
    assert merged.load().config.vocab_size == SIZE
    assert "vocabularies differ; the base's is kept" in str(plan_of(*experts, vocabulary="base"))


@pytest.mark.parametrize("method", ["average", "ties"])
def test_common_rows_are_merged_and_the_others_are_the_base_s(tmp_path, method):
    base = models.tiny_llama(vocab_size=SIZE + 2)
    base_folder, experts = save(base, tmp_path / "base"), []
    for seed, size in ((1, SIZE), (2, SIZE + 5)):
        expert = models.perturbed(base, seed)
        expert.resize_token_embeddings(size, mean_resizing=False)
        experts.append(save(expert, tmp_path / f"expert{seed}"))
    options = {"base": base_folder, "method": method, "vocabulary": "common"}
    options |= {"density": 1.0, "scale": 1.0} if method == "ties" else {}
    merged = mats_hub.merge(experts, **options)
    origin, first, second, ours = (
        load_file(Path(folder, "model.safetensors")) for folder in (base_folder, *experts, merged.folder)
    )
    for key in (EMBEDDING, "lm_head.weight"):
        assert ours[key].shape == origin[key].shape
        assert torch.equal(ours[key][SIZE:], origin[key][SIZE:])
        if method == "average":
            torch.testing.assert_close(ours[key][:SIZE], (first[key] + second[key][:SIZE]) / 2)
        else:
            assert not torch.equal(ours[key][:SIZE], origin[key][:SIZE])
    logits = merged.load()(torch.tensor([[1, 2, SIZE + 1]])).logits
    assert logits.shape[-1] == SIZE + 2
    assert logits.isfinite().all()


def test_common_rows_need_a_base(experts):
    with pytest.raises(PlanError, match=r"there is none; name it with 'base'"):
        mats_hub.merge(experts[0], method="average", vocabulary="common")


def test_classifiers_of_another_vocabulary_load_with_their_heads(tmp_path):
    base = save(models.tiny_bert_body(), tmp_path / "base", "bert")
    for seed, size in ((1, SIZE), (2, SIZE + 3)):
        model = models.tiny_bert_classifier(vocab_size=size, labels=seed + 1)
        models.shaken(model.parameters(), seed, 0.05)
        save(model, tmp_path / f"expert{seed}", "bert")
    merged = mats_hub.merge(
        [str(tmp_path / f"expert{seed}") for seed in (1, 2)], base=base, method="average", vocabulary="base"
    )
    for task, labels in (("expert1", 2), ("expert2", 3)):
        model = merged.load(task)
        assert model.config.vocab_size == SIZE
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, labels)


def test_a_tokenizer_with_other_ids_is_refused(experts):
    (same, _), base = experts
    path = Path(same, "tokenizer.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["film"], vocabulary["plot"] = vocabulary["plot"], vocabulary["film"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        PlanError, match=r"expert 'same' has another tokenizer .*: 2 tokens have other ids, such as '(film|plot)'"
    ):
        mats_hub.merge([same], base=base, method="average")
    mats_hub.merge([same], base=base, method="average", vocabulary="base")


def test_differences_of_configs_are_listed(tmp_path):
    base = models.tiny_llama()
    save(base, tmp_path / "base")
    other = models.perturbed(base, 1)
    other.config.max_position_embeddings = 4096
    other.config.rms_norm_eps = 1e-3
    save(other, tmp_path / "other")
    merged = mats_hub.merge([str(tmp_path / "other")], base=str(tmp_path / "base"), method="average")
    notes = [note for note in merged.report.notes if "config of expert 'other' differs" in note]
    assert len(notes) == 1
    assert (
        f"max_position_embeddings {base.config.max_position_embeddings} → 4096; rms_norm_eps 1e-06 → 0.001" in notes[0]
    )
    assert "→ 4096; rms" in (merged.folder / "README.md").read_text()
