"""Opening an adapter: which type it is, and which types are no change of the base's weights."""

from __future__ import annotations

from mats_hub.adapter import LORA_VARIANTS, Adapter, FoldedAdapter, Ia3Adapter
from mats_hub.checkpoint import Checkpoint, check_fields
from mats_hub.errors import CheckpointError
from mats_hub.lora import LoraAdapter
from mats_hub.source import Source

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights (their beginnings) with which loading an adapter changes the base as well."""

NOT_WEIGHTS = {
    "PROMPT_TUNING": "it is a prompt",
    "MULTITASK_PROMPT_TUNING": "it is a prompt",
    "P_TUNING": "it is a prompt",
    "PREFIX_TUNING": "it is a prefix of keys and values",
    "CPT": "it is a prompt",
    "LILY": "it shares factors between layers, and PEFT cannot merge it",
    "UNILORA": "its tensors do not say which modules they change",
    "CARTRIDGE": "it is a prefix of keys and values",
    "ADAPTION_PROMPT": "it adds attention to a prompt",
    "XLORA": "it routes between several adapters",
    "POLY": "it routes between several adapters",
    "SHADOW": "it adds a network beside the base",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "layer_replication": "it repeats layers of the base",
    "arrow_config": "Arrow routes between several adapters",
    "use_qalora": "QALoRA pools the inputs of a quantized base",
}
"""Adapter types and LoRA options that are no change of the base's weights, and why."""

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
    "feedforward_modules": (list, str),
}
"""The fields of an adapter_config.json that are read here, and what they may hold beside null."""


def open_adapter(source: Source) -> Adapter:
    """Return the adapter in a source.

    Raises:
        CheckpointError: no change of weights, not well formed, or a tensor that is not known.

    """
    checkpoint = Checkpoint(source)
    options = source.json("adapter_config.json")
    check_fields(options, OPTION_FIELDS, f"{source.spec!r}: adapter_config.json")
    kind = options.get("peft_type")
    if not kind:
        raise CheckpointError(
            f"{source.spec!r}: adapter_config.json names no peft_type; save the adapter with PEFT again"
        )
    for name, reason in NOT_WEIGHTS.items():
        if name == kind or options.get(name):
            raise CheckpointError(
                f"{source.spec!r} is a {kind} adapter{'' if name == kind else f' with {name}'}: {reason}, not a change of the "
                "base's weights, so it cannot be merged with others. Leave it out"
            )
    if kind == "IA3":
        return Ia3Adapter(checkpoint, options)
    init = str(options.get("init_lora_weights") or "").lower()
    varied = any(options.get(option) for option in LORA_VARIANTS) or init.startswith(BASE_CHANGING_INITS)
    return LoraAdapter(checkpoint, options) if kind == "LORA" and not varied else FoldedAdapter(checkpoint, options)
