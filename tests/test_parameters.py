"""Curvatures of every kind of parameter on every architecture, against the definition: one example at a time, autograd alone.

A Gram is the Hessian of matching outputs: ⟨V, C V⟩ = mean over tokens of ‖m(p + V)(x) − m(p)(x)‖², for the module m that uses
the parameter p. K-FAC takes the second moments of inputs and of output gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import transformers
from test_loading import tiny_gpt_oss, tiny_mixtral, tiny_nomic_bert, tiny_resnet, tiny_whisper
from torch import Tensor, nn

from mats_hub.architecture import stored_pieces
from mats_hub.curvature import Curvature
from mats_hub.recipe import Curvature as CurvatureOptions
from mats_hub.statistics import Provenance, Statistics, Sums
from mats_hub.statistics.collect import collect, survey
from mats_hub.statistics.storage import read_sums, write_sums
from mats_hub.statistics.watch import transposed_modules

WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = WIDTH | {"vocab_size": 36, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
SIDES = {
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
       {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()},
    **{"d_model": 16, "vocab_size": 36, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 4,
       "eos_token_id": 5, "decoder_start_token_id": 5, "forced_eos_token_id": None},
}  # fmt: skip
CLIP = {
    "text_config": TEXT | {"eos_token_id": 5, "bos_token_id": 4, "projection_dim": 8},
    "vision_config": WIDTH | {"image_size": 8, "patch_size": 4, "projection_dim": 8},
    "projection_dim": 8,
}
WAV2VEC2 = WIDTH | {
    **{
        "conv_dim": (8, 8),
        "conv_kernel": (4, 3),
        "conv_stride": (2, 2),
        "num_feat_extract_layers": 2,
        "vocab_size": 12,
    },
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "pad_token_id": 0},
}


def made(class_name: str, config: str, **settings: Any) -> Callable[[], Any]:
    """Return a maker of a random model."""

    def make() -> Any:
        with models.seeded(3):
            return getattr(transformers, class_name)(getattr(transformers, config)(**settings))

    return make


SLIDING = {"sliding_window": 8}
ARCHITECTURES: dict[str, tuple[Callable[[], Any], str, str]] = {
    # name: maker, kind of data, what no curvature is there for
    "BERT": (models.tiny_bert_classifier, "label", ""),
    "RoBERTa": (made("RobertaForSequenceClassification", "RobertaConfig", **TEXT), "label", ""),
    "DeBERTa-v3": (
        made("DebertaV2ForSequenceClassification", "DebertaV2Config", **TEXT, relative_attention=True, position_buckets=4,
             norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0),
        "label", "rel_embeddings",
    ),
    "ModernBERT": (
        made("ModernBertForSequenceClassification", "ModernBertConfig", **TEXT, global_attn_every_n_layers=2), "label", ""
    ),
    "T5": (models.tiny_t5, "target", "relative_attention_bias"),
    "BART": (made("BartForConditionalGeneration", "BartConfig", **SIDES), "target", ""),
    "GPT-2": (models.tiny_gpt2, "tokens", ""),
    "Llama": (models.tiny_llama, "tokens", ""),
    "Qwen2": (made("Qwen2ForCausalLM", "Qwen2Config", **TEXT, num_key_value_heads=1), "tokens", ""),
    "Qwen3": (made("Qwen3ForCausalLM", "Qwen3Config", **GROUPED), "tokens", ""),
    "Mistral": (made("MistralForCausalLM", "MistralConfig", **GROUPED, **SLIDING), "tokens", ""),
    "Gemma": (made("GemmaForCausalLM", "GemmaConfig", **GROUPED), "tokens", ""),
    "Gemma 3": (made("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, **SLIDING), "tokens", ""),
    "Mixtral": (tiny_mixtral, "tokens", ""),
    "JetMoe": (
        made("JetMoeForCausalLM", "JetMoeConfig", **TEXT, kv_channels=8, num_local_experts=3, num_experts_per_tok=2),
        "tokens", "bias",
    ),
    "Phi-MoE": (
        made("PhimoeForCausalLM", "PhimoeConfig", **GROUPED, num_local_experts=3, num_experts_per_tok=2), "tokens", ""
    ),
    "gpt-oss": (tiny_gpt_oss, "tokens", "sinks|router.bias|proj_bias"),
    "ViT": (models.tiny_vit, "image", "cls_token|position_embeddings"),
    "ResNet": (tiny_resnet, "image", ""),
    "CLIP": (made("CLIPModel", "CLIPConfig", **CLIP), "pairs", "class_embedding|logit_scale"),
    "Whisper": (tiny_whisper, "speech", "embed_positions"),
    "wav2vec 2.0": (made("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAV2VEC2), "sound", "pos_conv_embed"),
}  # fmt: skip
LENGTHS = (3, 6, 2, 5)


def examples_of(kind: str) -> list[dict[str, Tensor]]:
    """Return single examples, unpadded, of different lengths where they have one."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(6, 36, (1, length), generator=generator)
        noise = {"pixel_values": (3, 8, 8), "input_features": (8, 16), "input_values": (40,)}
        drawn = {name: torch.randn(1, *shape, generator=generator) for name, shape in noise.items()}
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        target = torch.randint(6, 36, (1, 7 - length), generator=generator)
        found.append(
            {
                "label": tokens | {"labels": torch.tensor([index % 2])},
                "tokens": tokens | {"labels": ids},
                "target": tokens | {"labels": target},
                "image": {"pixel_values": drawn["pixel_values"], "labels": torch.tensor([index % 3])},
                "pairs": tokens | {"pixel_values": drawn["pixel_values"]},
                "speech": {"input_features": drawn["input_features"], "labels": target},
                "sound": {"input_values": drawn["input_values"], "labels": target[:, :1] % 12},
            }[kind]
        )
    return found


def batched(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return examples as one batch, padded on the right; the decoder's side one longer than the encoder's longest."""
    batch = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if key in ("input_ids", "attention_mask", "labels") and values[0].dim() == 2:
            longest = max(value.shape[1] for value in values)
            longest += (
                key == "labels"
                and "input_ids" in examples[0]
                and longest == max(e["input_ids"].shape[1] for e in examples)
                and any(e["labels"].shape != e["input_ids"].shape for e in examples)
            )
            fill = -100 if key == "labels" else 0
            values = [nn.functional.pad(value, (0, longest - value.shape[1]), value=fill) for value in values]
        batch[key] = torch.cat(values)
    return batch


def masks(model: Any) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    def masks_of(batch: dict[str, Tensor]) -> list[Tensor]:
        found = [batch["attention_mask"].bool()] if "attention_mask" in batch else []
        return found + ([batch["labels"] != -100] if model.config.is_encoder_decoder else [])

    return masks_of


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return a sum over the examples of some function of each one's outputs at its own tokens."""
    output = model(**batch)
    if "image_embeds" in output:
        return (output.image_embeds + 2 * output.text_embeds).square().sum() + (output.image_embeds**3).sum()
    values = output.logits.float()
    if values.dim() == 3:
        counted = batch["labels"] != -100 if model.config.is_encoder_decoder else batch.get("attention_mask")
        values = values if counted is None else values * counted[..., None]
    return (values.softmax(-1) ** 2).sum() + values.square().sum()


@cache
def case(name: str) -> SimpleNamespace:
    make, kind, without = ARCHITECTURES[name]
    model = make().eval()
    examples = examples_of(kind)
    singly = measure(model, examples)
    return SimpleNamespace(model=model, examples=examples, sums=singly, without=without)


def measure(model: Any, batches: list[dict[str, Tensor]]) -> Sums:
    return collect(model, batches, ("gram", "kfac"), loss, masks(model))


def statistics(sums: Sums, transposed: Iterable[str] = ()) -> Statistics:
    return Statistics(Provenance(("gram", "kfac"), examples=len(LENGTHS), transposed=tuple(transposed)), sums)


NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


@NAMES
def test_everything_has_a_curvature_but_what_is_named(name: str) -> None:
    made = case(name)
    found = statistics(made.sums)
    for kind in ("gram", "kfac"):
        lacking = {p for p, _ in made.model.named_parameters()} - set(found.covers(kind))
        named = made.without.split("|") if made.without else []
        assert all(any(part in parameter for part in named) for parameter in lacking), lacking
        assert all(any(part in parameter for parameter in lacking) for part in named)


@NAMES
def test_padding_and_batches_change_nothing(name: str) -> None:
    made = case(name)
    order = made.examples[::-1]
    for batches in ([batched(made.examples)], [batched(order[:1]), batched(order[1:])]):
        sums = measure(made.model, batches)
        assert (sums.tokens, sums.aliases, sums.uses) == (made.sums.tokens, made.sums.aliases, made.sums.uses)
        assert sums.tensors.keys() == made.sums.tensors.keys()
        for key, value in made.sums.tensors.items():
            size = float(value.abs().max())
            torch.testing.assert_close(
                sums.tensors[key], value, rtol=1e-3, atol=2e-5 * size + 1e-12, msg=lambda t, k=key: f"{k}: {t}"
            )


@NAMES
def test_parts_of_the_data_add_up_and_are_taken_up_again_to_the_last_bit(name: str, tmp_path: Path) -> None:
    made = case(name)
    a, b = made.examples[:1], made.examples[1:]
    seen = survey(made.model, batched(made.examples), masks(made.model))
    first, second = (collect(made.model, part, ("gram", "kfac"), loss, masks(made.model), seen=seen) for part in (a, b))
    total = second.merged(first)
    for key, value in made.sums.tensors.items():
        torch.testing.assert_close(total.tensors[key], value, rtol=1e-6, atol=1e-9 * float(value.abs().max()))
    assert (total.tokens, total.uses) == (made.sums.tokens, made.sums.uses)
    start = collect(made.model, a, ("kfac",), loss, masks(made.model), seen=seen)
    write_sums(start, tmp_path / "part", {"batches": 1})
    read, metadata = read_sums(tmp_path / "part")
    assert metadata == {"batches": 1}
    resumed = collect(made.model, b, ("kfac",), loss, masks(made.model), seen=seen, sums=read)
    at_once = collect(made.model, made.examples, ("kfac",), loss, masks(made.model), seen=seen)
    assert (resumed.tokens, resumed.uses, resumed.aliases) == (at_once.tokens, at_once.uses, at_once.aliases)
    assert resumed.examples == len(made.examples)
    assert resumed.tensors.keys() == at_once.tensors.keys()
    assert all(torch.equal(value, at_once.tensors[key]) for key, value in resumed.tensors.items())


def calls(
    model: Any, examples: list[dict[str, Tensor]], names: list[str]
) -> Iterator[tuple[str, Any, tuple, dict, Any]]:
    """Run the examples one by one; yield what each module of these names was called with and gave."""
    seen: list[tuple[str, Any, tuple, dict, Any]] = []
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda module, given, named, output, n=n: seen.append((n, module, given, named, output)), with_kwargs=True
        )
        for n in names
    ]
    with torch.no_grad():
        for example in examples:
            model(**example)
    for handle in handles:
        handle.remove()
    yield from seen


def in_modules(model: Any, parameter: str, use: str, module: str) -> tuple[list[str], str]:
    """Return the modules that a use is in, and what the parameter is called there; a tied weight is in several."""
    held = model.get_parameter(parameter)
    if len([m for m in model.modules() if getattr(m, "weight", None) is held]) > 1:
        kind = nn.Linear if module.endswith(".as_output") else nn.Embedding
        return [n for n, m in model.named_modules() if isinstance(m, kind) and m.weight is held], "weight"
    return [parameter.rpartition(".")[0]], parameter.rpartition(".")[2]


@NAMES
def test_a_gram_is_the_hessian_of_matching_outputs(name: str) -> None:
    made = case(name)
    model, found = made.model, statistics(made.sums, transposed_modules(made.model))
    generator = torch.Generator().manual_seed(1)
    for parameter, uses in made.sums.uses.items():
        held = model.get_parameter(parameter)
        V = torch.randn(held.shape, generator=generator)
        expected = 0.0
        for use, module in uses:
            if use == "experts":
                expected += expert_outputs(model, made.examples, parameter, V) / made.sums.tokens[module]
                continue
            where, leaf = in_modules(model, parameter, use, module)
            moved = 0.0
            for _, called, given, named, _ in calls(model, made.examples, where):
                with torch.no_grad():
                    both = [
                        torch.func.functional_call(called, {leaf: value}, given, named)
                        for value in (held.detach() + V, held.detach())
                    ]
                both = [b[0] if isinstance(b, tuple) else b for b in both]  # a router gives its logits first
                scale = float(getattr(called, "embed_scale", 1.0))  # of a row after it was looked up
                moved += float(((both[0] - both[1]) / scale).double().square().sum())
            expected += moved / made.sums.tokens[module]
        got = form(
            found.curvature(parameter, CurvatureOptions(kind="gram")),
            V,
            found.is_transposed(parameter),
            made,
            parameter,
        )
        assert got == pytest.approx(expected, rel=2e-3), (parameter, uses)


def form(curvature: Curvature, V: Tensor, turned: bool, made: Any, parameter: str) -> float:
    """Return ⟨V, C V⟩, with V as the curvature acts on it."""
    transposed_stack = (
        V.dim() == 3
        and "gate_up_proj" in parameter + "gate_up_proj"
        and type(made.model).__name__ == "GptOssForCausalLM"
    )
    V = V.mT if turned or transposed_stack else V
    V = V.flatten(1) if V.dim() > 2 and made.sums.uses[parameter][0][0] != "experts" else V
    return float((V.double() * curvature.matvec(V).double()).sum())


def expert_outputs(model: Any, examples: list[dict[str, Tensor]], parameter: str, V: Tensor) -> float:
    """Return Σ ‖V x‖² over the rows x that each expert's matrix multiplies, by the model's own routing written out."""
    where, leaf = parameter.rpartition(".")[0], parameter.rpartition(".")[2]
    turned = type(model).__name__ == "GptOssForCausalLM"
    total = 0.0
    for _, experts, given, named, _ in calls(model, examples, [where]):
        states, index = (*given, *named.values())[:2]
        if isinstance(index, list):  # the tokens are sorted by their expert, and this is how many each has
            for rows, matrix in zip(states.split(index), V, strict=True):
                total += float((rows @ matrix.T).detach().double().square().sum())
            continue
        states = states.reshape(-1, states.shape[-1])
        for expert in range(len(V)):
            rows = states[(index.reshape(len(states), -1) == expert).any(-1)]
            if leaf == "down_proj":
                up = rows @ (experts.gate_up_proj[expert] if turned else experts.gate_up_proj[expert].T)
                if turned:
                    rows = experts._apply_gate(up + experts.gate_up_proj_bias[expert])
                else:
                    gate, up = up.chunk(2, -1)
                    rows = experts.act_fn(gate) * up
            total += float((rows @ (V[expert] if turned else V[expert].T)).detach().double().square().sum())
    return total


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@NAMES
def test_kfac_takes_second_moments_of_gradients(name: str) -> None:
    """Of a product the Gram of output gradients; of a vector the squares of each token's gradient."""
    made = case(name)
    model = made.model
    wanted = {
        module for uses in made.sums.uses.values() for use, module in uses if use in ("linear", "convolution", "norm")
    }
    names = [n for n, _ in model.named_modules() if n in wanted]
    total: dict[str, Tensor] = {}
    for example in made.examples:
        outputs: list[tuple[str, Any, Tensor, Tensor]] = []
        handles = [
            model.get_submodule(n).register_forward_hook(
                lambda module, given, output, n=n, outputs=outputs: outputs.append(
                    (n, module, first(output), first(output).detach().clone())
                )
            )
            for n in names
        ]
        value = loss(model, example)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(value, [output for _, _, output, _ in outputs], allow_unused=True)
        for (n, module, _, output), gradient in zip(outputs, gradients, strict=True):
            if gradient is None:
                continue
            if module.weight.dim() > 1:
                rows = gradient.flatten(2).transpose(1, 2) if module.weight.dim() > 2 else gradient
                rows = rows.reshape(-1, rows.shape[-1]).double()
                total[n] = total.get(n, 0) + rows.T @ rows
                continue
            over_channels = isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
            channels = (1, -1, *(1 for _ in output.shape[2:])) if over_channels else (-1,)
            bias = getattr(module, "bias", None)
            plus_one = "Gemma" in type(module).__name__
            scale = (module.weight + 1 if plus_one else module.weight).view(channels)
            normal = (output - (0 if bias is None else bias.view(channels))) / scale
            per_token = (gradient * normal).double().square()
            axes = [axis for axis in range(output.dim()) if axis != (1 if over_channels else output.dim() - 1)]
            total[f"{n}.weight"] = total.get(f"{n}.weight", 0) + per_token.sum(axes)
            if bias is not None:
                total[f"{n}.bias"] = total.get(f"{n}.bias", 0) + gradient.double().square().sum(axes)
    checked = 0
    for n, expected in total.items():
        key = f"{n}.output_gram" if f"{n}.output_gram" in made.sums.tensors else f"{n}.gradient_squares"
        size = float(expected.detach().abs().max())
        torch.testing.assert_close(
            made.sums.tensors[key].double(),
            expected.detach(),
            rtol=1e-2,
            atol=1e-4 * size + 1e-12,
            msg=lambda t, k=key: f"{k}: {t}",
        )
        checked += 1
    assert checked >= len(names) - 1


def test_stored_experts_get_sums_of_their_own() -> None:
    made = case("Mixtral")
    sums = measure(made.model, made.examples)
    parts = stored_pieces(made.model)
    assert len(parts) == 2 * 3 * 3
    sums.narrow()
    whole = {key: value.clone() for key, value in sums.tensors.items()}
    sums.as_stored(parts)
    found = statistics(sums)
    state = made.model.state_dict()
    for other, [(parameter, index, start, stop)] in parts.items():
        rows = slice(start, stop)
        kfac = found.curvature(other, CurvatureOptions(kind="kfac"))
        count = made.sums.tokens[parameter]
        torch.testing.assert_close(kfac.input, whole[f"{parameter}.input_gram"][index] / count)
        torch.testing.assert_close(kfac.output, whole[f"{parameter}.output_gram"][index][rows, rows] / count)
        assert kfac.matvec(state[parameter][index][rows]).shape == state[parameter][index][rows].shape
    assert not any("gate_up_proj" in parameter for parameter in found.covers("gram"))


def test_what_a_curvature_holds_is_known_before_it_is_made() -> None:
    for name in ("GPT-2", "ViT", "gpt-oss", "Llama"):
        found = statistics(case(name).sums)
        for kind in ("gram", "kfac"):
            for parameter in found.covers(kind):
                made = found.curvature(parameter, CurvatureOptions(kind=kind))
                terms = getattr(made, "terms", (made,))
                held = sum(v.numel() for term in terms for v in vars(term).values() if isinstance(v, Tensor))
                assert found.entries(parameter, kind) >= held, (parameter, kind)
                assert found.entries(parameter, kind) <= held + 1


def test_weights_that_a_checkpoint_stores_as_one_have_their_rows_sums() -> None:
    model, examples = tiny_nomic_bert(seed=3), examples_of("label")
    apart, sums = measure(model, examples), measure(model, examples)
    for found in (apart, sums):
        found.narrow()
    joined = stored_pieces(model)
    assert set(joined) == {f"nomic_bert.encoder.layers.{layer}.attn.Wqkv.weight" for layer in range(2)}
    sums.as_stored(joined)
    assert not {piece.parameter for made in joined.values() for piece in made} & {*sums.uses}
    whole, parts = statistics(sums), statistics(apart)
    generator = torch.Generator().manual_seed(2)
    for name, made in joined.items():
        for kind in ("gram", "kfac"):
            options = CurvatureOptions(kind=kind)
            V = torch.randn(48, 16, generator=generator)
            held = zip(made, V.split([piece.stop - piece.start for piece in made]), strict=True)
            expected = [parts.curvature(piece.parameter, options).matvec(part) for piece, part in held]
            torch.testing.assert_close(whole.curvature(name, options).matvec(V), torch.cat(expected))
