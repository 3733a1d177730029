"""PEFT adapters: a LoRA folder read as low-rank deltas of its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mats_hub.checkpoint import Checkpoint, check_fields
from mats_hub.delta import LowRankDelta
from mats_hub.errors import CheckpointError
from mats_hub.source import Source

TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types and the transformers class that loads such a model."""

REFUSED_OPTIONS = {
    "use_dora": "DoRA rescales the columns of base + adapter",
    "lora_bias": "its B has a bias",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "layer_replication": "it repeats layers of the base",
    "kasa_config": "KaSA changes the base as well",
    "arrow_config": "Arrow routes between several adapters",
    "velora_config": "VeLoRA stores other factors",
    "monteclora_config": "its factors are random variables",
}
"""LoRA variants whose effect is not scale · B A, and why."""


OPTION_FIELDS: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "task_type": (str,),
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "lora_alpha": (int, float),
    "alpha_pattern": (dict,),
    "use_rslora": (bool,),
    "fan_in_fan_out": (bool,),
    "target_parameters": (list,),
}
"""The fields of an adapter_config.json that are read here, and what they may hold beside null."""


@dataclass(frozen=True)
class Factors:
    """The names and the scale of one module's factors: B ``[out, r]`` and A ``[r, in]``."""

    B: str
    A: str
    scale: float
    transposed: bool
    shape: tuple[int, ...]


class LoraAdapter:
    """A LoRA adapter: low-rank deltas of some weights, and whole tensors for others (``modules_to_save``, biases).

    Attributes:
        checkpoint: the adapter's tensors.
        options: adapter_config.json.
        factors: weight name in the model → its factors.
        saved: tensor name in the model → its name in the file, for tensors stored whole.

    Raises:
        CheckpointError: not a LoRA adapter, a variant whose effect is not a low-rank delta, or a tensor that is not known.

    """

    def __init__(self, source: Source) -> None:
        self.checkpoint = Checkpoint(source)
        self.options = source.json("adapter_config.json")
        check_fields(self.options, OPTION_FIELDS, f"{source.spec!r}: adapter_config.json")
        self._refuse_variants()
        self.factors: dict[str, Factors] = {}
        self.saved: dict[str, str] = {}
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        for name in self.checkpoint.headers:
            module = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            found = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", module)
            if found:
                pairs.setdefault((found[1], bool(found[2])), {})[found[3]] = name
            elif "lora_" in module or "trainable_tokens" in module or not module.endswith((".weight", ".bias")):
                raise CheckpointError(
                    f"{source.spec!r}: tensor {name!r} is none that a plain LoRA adapter has; merge it into its base "
                    "with PEFT's merge_and_unload() and use the full checkpoint"
                )
            else:
                self.saved[module.replace(".modules_to_save.", ".")] = name
        for (module, embedding), pair in pairs.items():
            self.factors[f"{module}.weight"] = self._pair(module, embedding, pair)

    @property
    def base(self) -> str:
        """The base model the adapter says it was trained on, with its revision when it names one."""
        name = str(self.options.get("base_model_name_or_path") or "")
        revision = self.options.get("revision")
        return f"{name}@{revision}" if name and revision else name

    @property
    def rank(self) -> int:
        """The largest rank of its factors."""
        return max((self.checkpoint.headers[f.A].shape[0] for f in self.factors.values()), default=0)

    def delta(self, name: str) -> LowRankDelta:
        """Return scale · B A of one weight."""
        factors = self.factors[name]
        tensor = self.checkpoint.tensor
        return LowRankDelta(tensor(factors.B), tensor(factors.A), factors.scale, factors.transposed)

    def orient(self, name: str, transposed: bool) -> None:
        """Set whether a weight is stored ``[in, out]``: PEFT writes one `fan_in_fan_out` for all modules, its last one's."""
        factors = self.factors[name]
        if factors.transposed != transposed and ".lora_embedding_" not in factors.A:
            self.factors[name] = replace(factors, transposed=transposed, shape=factors.shape[::-1])

    def _refuse_variants(self) -> None:
        spec = self.checkpoint.source.spec
        kind = self.options.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{spec!r} is a {kind or 'nameless'} adapter; LoRA adapters and full checkpoints can be merged. Merge it "
                "into its base with PEFT's merge_and_unload() and use the full checkpoint"
            )
        for option, reason in REFUSED_OPTIONS.items():
            if self.options.get(option):
                raise CheckpointError(
                    f"{spec!r} uses {option} ({reason}), so its change is not a low-rank delta. Merge it into its base "
                    "with PEFT's merge_and_unload() and use the full checkpoint"
                )
        for parameter in self.options.get("target_parameters") or ():
            if not str(parameter).endswith(".weight"):
                raise CheckpointError(
                    f"{spec!r} changes the parameter {parameter!r} (target_parameters), which is no linear module's weight. "
                    "Merge it into its base with PEFT's merge_and_unload() and use the full checkpoint"
                )

    def _pair(self, module: str, embedding: bool, pair: Mapping[str, str]) -> Factors:
        spec, headers = self.checkpoint.source.spec, self.checkpoint.headers
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{spec!r}: module {module!r} has only LoRA factor {'/'.join(pair)}; fetch it again")
        a, b = headers[pair["A"]].shape, headers[pair["B"]].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise CheckpointError(
                f"{spec!r}: module {module!r} has LoRA factors of shapes B {b} and A {a}, which are no matrix product. "
                "Merge it into its base with PEFT's merge_and_unload() and use the full checkpoint"
            )
        transposed = embedding or bool(self.options.get("fan_in_fan_out"))
        shape = (a[1], b[0]) if transposed else (b[0], a[1])
        return Factors(pair["B"], pair["A"], self._scale(module, a[0]), transposed, shape)

    def _scale(self, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / √r for rsLoRA, with PEFT's rule for patterns of module names."""
        alpha = self.options.get("lora_alpha") or 8
        for pattern, value in (self.options.get("alpha_pattern") or {}).items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error:
                found = None
            if found and isinstance(value, int | float):
                alpha = value
                break
        return float(alpha) / (rank**0.5 if self.options.get("use_rslora") else rank)
