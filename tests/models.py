"""Tiny models with random weights, saved as real ones are: with a config, a tokenizer or processor, and safetensors.

Everything is a function of its seed. A factory saves into the folder it is given and returns the model it saved; other
keywords go into the model's config. `perturbed` makes a fine-tuned variant, `lora_adapter` and `ia3_adapter` PEFT adapters
with an effect.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>")
WORDS = (
    *("the", "a", "film", "plot", "cast", "song", "was", "is", "felt", "never", "very", "quite", "good", "bad", "dull"),
    *(
        "bright",
        "slow",
        "quick",
        "warm",
        "cold",
        "and",
        "but",
        "or",
        "then",
        "so",
        "it",
        "they",
        "we",
        "liked",
        "hated",
    ),
)
VOCABULARY = len(SPECIAL) + len(WORDS)
TEMPLATES = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "gpt2": ("$A", "$A $B"),
    "llama": ("<s> $A", "<s> $A $B"),
    "t5": ("$A </s>", "$A </s> $B </s>"),
}
"""What each family's tokenizer puts around a text, and around a pair of texts."""

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


torch.set_num_threads(1)  # with more threads models this small are many times slower on a busy machine


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed`, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_tokenizer(family: str) -> Any:
    """Return a fast tokenizer over `WORDS` with the special tokens of a family: bert, gpt2, llama, t5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = TEMPLATES[family]
    special = [(token, ids[token]) for token in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    tokens = {"bert": {"cls_token": "[CLS]", "sep_token": "[SEP]"}}.get(family, {"eos_token": "</s>"})
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if family == "bert" else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=names,
        model_max_length=32,
        **tokens,
    )


def tiny_texts(count: int, seed: int = 0, shortest: int = 1, longest: int = 9) -> list[str]:
    """Return texts of words that every tiny tokenizer knows, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    span = longest - shortest + 1
    lengths = [shortest + (index * 5 + seed) % span for index in range(count)]
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def tiny_images(count: int, seed: int = 0, size: int = 8) -> list[Any]:
    """Return random RGB images."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def tiny_bert_classifier(folder: Path | None = None, seed: int = 0, labels: int = 2, **options: Any) -> Any:
    """Return a BERT that classifies texts."""
    return tiny_bert("BertForSequenceClassification", folder, seed, num_labels=labels, **options)


def tiny_bert_body(folder: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """Return a BERT without a head."""
    return tiny_bert("BertModel", folder, seed, **options)


def tiny_gpt2(folder: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """Return a GPT-2 language model: Conv1D modules, and a head tied to the embedding."""
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 4, "eos_token_id": 5}
    return _made("GPT2LMHeadModel", "GPT2Config", settings | options, folder, seed, tiny_tokenizer("gpt2"))


def tiny_llama(folder: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """Return a Llama language model with fewer key than query heads and an untied head."""
    settings = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 4, "eos_token_id": 5},
    }
    return _made("LlamaForCausalLM", "LlamaConfig", settings | options, folder, seed, tiny_tokenizer("llama"))


def tiny_t5(folder: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """Return a T5 with an encoder and a decoder, its head tied to the embedding."""
    settings = {
        **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        **{"eos_token_id": 5, "relative_attention_num_buckets": 8},
    }
    return _made("T5ForConditionalGeneration", "T5Config", settings | options, folder, seed, tiny_tokenizer("t5"))


def tiny_vit(folder: Path | None = None, seed: int = 0, labels: int = 3, **options: Any) -> Any:
    """Return a ViT that classifies 8 × 8 images."""
    from transformers import ViTImageProcessor

    settings = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 8, "patch_size": 4, "num_labels": labels, "vocab_size": None},
    }
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return _made("ViTForImageClassification", "ViTConfig", settings | options, folder, seed, processor)


FACTORIES = {
    "bert": tiny_bert_classifier,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "t5": tiny_t5,
    "vit": tiny_vit,
}
"""One model of every kind of task and of every way to store a weight."""


def perturbed(model: Any, seed: int, scale: float = 0.05) -> Any:
    """Return a copy of `model` whose every float parameter moved by noise of standard deviation `scale`."""
    moved = copy.deepcopy(model)
    shaken(moved.parameters(), seed, scale)
    return moved


def shaken(parameters: Any, seed: int, scale: float) -> None:
    """Add noise of standard deviation `scale` to parameters in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def save(model: Any, folder: Path, family: str | None = None, **options: Any) -> Path:
    """Save a model, and a family's tokenizer when it is named; `options` go to save_pretrained. Returns the folder."""
    model.save_pretrained(folder, **options)
    if family is not None:
        tiny_tokenizer(family).save_pretrained(folder)
    return Path(folder)


def lora_adapter(
    base_folder: Path,
    out_folder: Path,
    seed: int = 0,
    r: int = 4,
    alpha: float = 8,
    target_modules: Sequence[str] | str = ("query", "value"),
    task_type: str | None = "SEQ_CLS",
    rslora: bool = False,
    alpha_pattern: dict[str, float] | None = None,
    rank_pattern: dict[str, int] | None = None,
    labels: int | None = None,
    model_class: str | None = None,
    scale: float = 0.2,
    **options: Any,
) -> Any:
    """Make a PEFT LoRA adapter of a saved base, none of its factors zero, save it and return the PEFT model.

    Args:
        base_folder: a saved model; the adapter names it as its base.
        out_folder: where the adapter goes.
        seed: of its tensors, and of a head that the base does not have.
        r: rank.
        alpha: lora_alpha.
        target_modules: modules that get factors.
        task_type: SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION, or None.
        rslora: whether the scale is alpha / √r.
        alpha_pattern: module pattern → its own alpha.
        rank_pattern: module pattern → its own rank.
        labels: of a new classification head.
        model_class: the transformers class of the base; otherwise the task type's, or the one it was saved as.
        scale: standard deviation of its factors, and of what is added to the tensors it holds whole.
        options: further fields of `peft.LoraConfig`.

    """
    import peft

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    settings = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        task_type=task_type,
        use_rslora=rslora,
        alpha_pattern=alpha_pattern or {},
        rank_pattern=rank_pattern or {},
        **options,
    )
    model = _adapted(base_folder, settings, seed, labels, model_class)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for factor in factors:
            factor.zero_()
    return _shaken_and_saved(model, factors, out_folder, seed, scale)


def ia3_adapter(
    base_folder: Path,
    out_folder: Path,
    seed: int = 0,
    target_modules: Sequence[str] | str | None = None,
    feedforward_modules: Sequence[str] | str | None = None,
    task_type: str | None = "SEQ_CLS",
    labels: int | None = None,
    model_class: str | None = None,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """Make a PEFT (IA)³ adapter of a saved base, its vectors around one, save it and return the PEFT model.

    Args:
        base_folder: a saved model; the adapter names it as its base.
        out_folder: where the adapter goes.
        seed: of its tensors, and of a head that the base does not have.
        target_modules: modules that get a vector; PEFT's own for the architecture when not given, as the next.
        feedforward_modules: those of them whose inputs are scaled.
        task_type: SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION, or None.
        labels: of a new classification head.
        model_class: the transformers class of the base; otherwise the task type's, or the one it was saved as.
        scale: standard deviation of its vectors, and of what is added to the tensors it holds whole.
        dtype: what its tensors are drawn and saved in.
        options: further fields of `peft.IA3Config`.

    """
    import peft

    modules = {"target_modules": target_modules, "feedforward_modules": feedforward_modules}
    given = {name: value if isinstance(value, str | None) else list(value) for name, value in modules.items()}
    settings = peft.IA3Config(task_type=task_type, **given, **options)
    model = _adapted(base_folder, settings, seed, labels, model_class).to(dtype)
    vectors = [p for name, p in model.named_parameters() if "ia3_" in name]
    return _shaken_and_saved(model, vectors, out_folder, seed, scale)


def _adapted(base_folder: Path, settings: Any, seed: int, labels: int | None, model_class: str | None) -> Any:
    """Return a saved base with a new adapter in PEFT's hands, and a head of its own where the base has none."""
    import peft
    import transformers

    config = transformers.AutoConfig.from_pretrained(base_folder, **({} if labels is None else {"num_labels": labels}))
    class_name = model_class or AUTO_CLASSES.get(settings.task_type or "") or config.architectures[0]
    with seeded(seed):
        base = getattr(transformers, class_name).from_pretrained(base_folder, config=config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns when it corrects fan_in_fan_out and when a target is tied
            return peft.get_peft_model(base, settings)


def _shaken_and_saved(model: Any, adapter: list[nn.Parameter], folder: Path, seed: int, scale: float) -> Any:
    """Add noise to what PEFT would train, first the adapter's own parameters, and save them."""
    own = {id(parameter) for parameter in adapter}
    shaken(adapter, seed + 1, scale)
    shaken((p for p in model.parameters() if p.requires_grad and id(p) not in own), seed + 2, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ... and when it saves a target that is an embedding
        model.save_pretrained(folder)
    return model.eval()


def merged_lora(model: Any) -> Any:
    """Return a copy of a PEFT model, its adapter merged into the base by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).merge_and_unload().eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors, detached and copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def tiny_bert(class_name: str, folder: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """Return a BERT with a head, by its class."""
    settings = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"max_position_embeddings": 32},
    }
    return _made(class_name, "BertConfig", settings | options, folder, seed, tiny_tokenizer("bert"))


def _made(
    class_name: str, config_class: str, settings: dict[str, Any], folder: Path | None, seed: int, processor: Any
) -> Any:
    import transformers

    given = {"vocab_size": VOCABULARY, "pad_token_id": 0, **settings}
    config = getattr(transformers, config_class)(**{k: v for k, v in given.items() if v is not None})
    with seeded(seed):
        model = getattr(transformers, class_name)(config).float().eval()
    # Fresh weights have a standard deviation of 0.02 and zero biases: with noise every part of the model has an effect.
    shaken(model.parameters(), seed, 0.2)
    if folder is not None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model
