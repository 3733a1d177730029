"""A tiny model of every kind that transformers has, merged and compared with what follows from the experts' own tensors.

What this version of transformers cannot build small, store and read again unchanged, or adapt, is skipped and says so.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import models
import peft
import pytest
import torch
import transformers
from test_adapter_output import merged_state
from torch import Tensor
from transformers.models.auto import modeling_auto

import mats_hub
from mats_hub.errors import PlanError
from mats_hub.statistics.tasks import infer_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
]  # of what each model warns
LARGEST = 5_000_000
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dim_ff", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_key_value_heads", "type_vocab_size", "expand"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **{"vocab_size": models.VOCABULARY, "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 16},
    **{"word_embed_proj_dim": 32, "embedding_size": 16, "image_size": 16, "patch_size": 4, "rotary_dim": 4},
    **{"pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 5, "num_labels": 3, "num_stages": 2, "embed_dim": 16},
}
"""What the fields that configs share are made, where a config has them."""

STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_heads": [2, 4]}
"""The same of fields that are lists, with an entry for each stage."""

MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
KINDS = sorted({(kind, name) for mapping in MAPPINGS for kind, name in mapping.items() if isinstance(name, str)})


def small(default: dict[str, Any]) -> dict[str, Any]:
    """Return what to make a config of, and those of its parts, instead of what they are by default."""
    settings = {n: value for n, value in SMALL.items() if n in default and (n != "head_dim" or default[n] is not None)}
    settings |= {name: value for name, value in STAGES.items() if isinstance(default.get(name), list)}
    parts = {name: part for name, part in default.items() if isinstance(part, dict) and part.get("model_type")}
    return settings | {name: small(part) | {"model_type": part["model_type"]} for name, part in parts.items()}


def tiny(kind: str, class_name: str) -> Any:
    """Return a random model; skip what cannot be made so."""
    model_class = getattr(transformers, class_name)
    try:
        config = transformers.AutoConfig.for_model(kind, **small(transformers.AutoConfig.for_model(kind).to_dict()))
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        if size <= LARGEST:
            with models.seeded(0):
                return model_class(config).float().eval()
    except Exception as error:  # each kind has its own rules
        pytest.skip(f"no small {class_name}: {type(error).__name__} {str(error)[:80]}")
    pytest.skip(f"the small {class_name} has {size} parameters")


def states_of(model_class: Any, *folders: Path | str) -> list[dict[str, Tensor]]:
    return [models.state(model_class.from_pretrained(folder)) for folder in folders]


def assert_moved(
    got: dict[str, Tensor], base: dict[str, Tensor], experts: list[dict[str, Tensor]], scale: float
) -> None:
    """Check that a model is its base and so much of the sum of its experts' changes."""
    assert got.keys() == base.keys()
    for key, value in base.items():
        if value.is_floating_point():
            expected = value + scale * sum(expert[key] - value for expert in experts)
            torch.testing.assert_close(
                got[key], expected, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.fixture(params=KINDS, ids="-".join)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """Hand out the class of a model, and the folder it is stored in; skip what transformers itself does not give back."""
    base = tiny(*request.param)
    if base.config_class.model_type != request.param[0]:
        pytest.skip(f"its class is of another kind, {base.config_class.model_type}, which its experts are stored as")
    try:
        base.save_pretrained(tmp_path / "base")
        again = models.state(type(base).from_pretrained(tmp_path / "base"))
    except Exception as error:
        pytest.skip(f"transformers does not store it: {type(error).__name__} {str(error)[:80]}")
    if not all(torch.equal(again[key], value) for key, value in models.state(base).items()):
        pytest.skip("transformers does not give it back as it was stored")
    return type(base), tmp_path


def test_full_checkpoints(stored: tuple[Any, Path]) -> None:
    model_class, root = stored
    for seed in (1, 2):
        models.perturbed(model_class.from_pretrained(root / "base"), seed).save_pretrained(root / f"e{seed}")
    folders = [str(root / "e1"), str(root / "e2")]
    base, *experts = states_of(model_class, root / "base", *folders)
    for method, options, scale in (("average", {}, 0.5), ("task_arithmetic", {"scale": 0.7}, 0.7)):
        merged = mats_hub.merge(folders, base=str(root / "base"), method=method, **options)
        assert_moved(*states_of(model_class, merged.folder), base, experts, scale)
    task = infer_task(model_class.__name__).name
    if task not in ("causal-lm", "image-text-to-text") or merged.load().config.is_encoder_decoder:
        return
    try:
        for length in (8, 3):
            ids = torch.arange(6, 6 + length)[None]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            model_class.from_pretrained(folders[0])(**inputs, use_cache=False).loss.backward()
    except Exception as error:
        pytest.skip(f"merged, but so small it does not run: {type(error).__name__} {str(error)[:80]}")
    texts = datasets.Dataset.from_dict({"text": models.tiny_texts(6, seed=1)})
    for folder in folders:
        models.tiny_tokenizer("llama").save_pretrained(folder)
        output = Path(folder) / "statistics.safetensors"
        mats_hub.compute_statistics(folder, dataset=texts, kind="kfac", modules="all", batch_size=3, output=output)
    for method, options in (("regmean", {}), ("mats", {"iterations": 3})):
        merged = mats_hub.merge(folders, base=str(root / "base"), method=method, **options)
        assert merged.report.solved
        assert all(value.isfinite().all() for value in states_of(model_class, merged.folder)[0].values())


def test_lora_adapters(stored: tuple[Any, Path]) -> None:
    model_class, root = stored
    kept, folders = [], []
    for seed in (1, 2):
        settings = peft.LoraConfig(r=2 + seed, lora_alpha=6, target_modules="all-linear")
        try:
            model = peft.get_peft_model(model_class.from_pretrained(root / "base"), settings)
        except Exception as error:
            pytest.skip(f"PEFT does not adapt it: {type(error).__name__} {str(error)[:80]}")
        models.shaken([p for name, p in model.named_parameters() if "lora_" in name], seed, 0.1)
        try:
            model.save_pretrained(root / f"a{seed}")
        except NotImplementedError as error:
            pytest.skip(f"PEFT does not store it: {error}")
        folders.append(str(root / f"a{seed}"))
        kept.append(merged_state(model))
    [base] = states_of(model_class, root / "base")
    try:
        merged = mats_hub.merge(
            folders, base=str(root / "base"), method="task_arithmetic", scale=0.7, format="full", allow_other_base=True
        )
    except PlanError as error:
        if "stores once with" in str(error):
            pytest.skip("one of two tied weights is adapted")
        raise
    assert_moved(*states_of(model_class, merged.folder), base, kept, 0.7)

    def given_back(folder: Path | str) -> dict[str, Tensor]:
        return merged_state(peft.PeftModel.from_pretrained(model_class.from_pretrained(root / "base"), folder))

    again = given_back(folders[0])
    if not all(torch.allclose(again[key], value, rtol=1e-4, atol=1e-5) for key, value in kept[0].items()):
        pytest.skip("merged into a full checkpoint, but PEFT does not give back its own adapter")
    merged = mats_hub.merge(folders, base=str(root / "base"), method="average", format="adapter", allow_other_base=True)
    assert_moved(given_back(merged.folder), base, kept, 0.5)
