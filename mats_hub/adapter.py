"""PEFT adapters as changes of their base: (IA)³ as vectors, others as PEFT merges them; LoRA has a module of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

from mats_hub.architecture import Architecture, align
from mats_hub.checkpoint import Checkpoint
from mats_hub.delta import Delta, DenseDelta
from mats_hub.errors import CheckpointError
from mats_hub.tensor_header import TensorHeader

TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types and the transformers class that loads such a model."""

LORA_VARIANTS = (
    "use_dora",
    "lora_bias",
    "kasa_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "trainable_token_indices",
)
"""LoRA options whose effect is more than scale · B A, but which PEFT can merge into the base."""


class Adapter:
    """What adapters of every type have in common.

    Attributes:
        checkpoint: the adapter's tensors.
        options: adapter_config.json.
        saved: tensor name in the model → its name in the file, for tensors stored whole (``modules_to_save``, biases).
        changed: names of what it changes beside `saved`, as its model calls them.

    """

    title = ""

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.saved: dict[str, str] = {}

    @property
    def changed(self) -> Collection[str]:
        """Names of what it changes beside `saved`, as its model calls them."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """What it is, in words."""
        return f"{self.title} adapter"

    @property
    def base(self) -> str:
        """The base model the adapter says it was trained on, with its revision when it names one."""
        name = str(self.options.get("base_model_name_or_path") or "")
        revision = self.options.get("revision")
        return f"{name}@{revision}" if name and revision else name

    @property
    def model_class(self) -> str:
        """The class that it was trained on, '' where it does not say: a part of its base, perhaps."""
        told = self.options.get("auto_mapping")
        return str(told.get("base_model_class") or "") if isinstance(told, dict) else ""

    def settle(self, facts: Architecture, headers: Mapping[str, TensorHeader]) -> None:
        """Find out what only the base's architecture tells: orientation of weights, names of bare parameters."""

    def shape(self, own: str) -> tuple[int, ...]:
        """Return the shape of something it changes."""
        raise NotImplementedError

    def files(self, own: str) -> tuple[str, ...]:
        """Return the names, in the file, of the tensors behind something it changes."""
        raise NotImplementedError

    def delta(self, own: str) -> Delta:
        """Return its change, read from the file."""
        raise NotImplementedError

    def _save(self, own: str, name: str) -> None:
        if ".original_module." not in own:  # what modules_to_save has replaced; PEFT saves its biases with bias="all"
            self.saved[own.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name

    def _unknown(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.source.spec!r}: tensor {name!r} is none that a {self.title} adapter has; merge it into its "
            "base with PEFT's merge_and_unload() and use the full checkpoint"
        )


class Ia3Adapter(Adapter):
    """An (IA)³ adapter: vectors that scale the inputs or outputs of modules (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

    Its change of a vector is that vector minus one, for the base has ones.

    Attributes:
        vectors: ``{module}.ia3_l`` in the model → its name in the file.

    Raises:
        CheckpointError: a tensor that is not known.

    """

    title = "(IA)³"

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        super().__init__(checkpoint, options)
        self.vectors: dict[str, str] = {}
        for name, header in checkpoint.headers.items():
            module = name.removeprefix("base_model.model.")
            if module.endswith(".ia3_l") and header.numel == max(header.shape, default=0):
                self.vectors[module] = name
            elif re.search(r"\.(ia3|lora)_", module) or not module.endswith((".weight", ".bias")):
                raise self._unknown(name)
            else:
                self._save(module, name)

    @property
    def changed(self) -> Collection[str]:
        """Its vectors."""
        return self.vectors

    def shape(self, own: str) -> tuple[int, ...]:
        """Return the shape a vector is stored in: ``[out, 1]``, or ``[1, in]`` where it scales inputs."""
        return self.checkpoint.headers[self.vectors[own]].shape

    def files(self, own: str) -> tuple[str, ...]:
        """Return a vector's name in the file."""
        return (self.vectors[own],)

    def delta(self, own: str) -> DenseDelta:
        """Return a vector minus one, in its stored shape."""
        return DenseDelta(at_least_float32(self.checkpoint.tensor(self.vectors[own])) - 1)


class FoldedAdapter(Adapter):
    """An adapter of any other type: PEFT merges it into its base, and what the merge changes are its deltas.

    `mats_hub.loading.fold` makes them; until then only which tensors they change is known.

    Attributes:
        deltas: the changes, once they are made.

    """

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        super().__init__(checkpoint, options)
        self.title = ", ".join([str(options["peft_type"]), *(o for o in LORA_VARIANTS if options.get(o))])
        self.deltas: Checkpoint | None = None
        self._touched: dict[str, tuple[int, ...]] = {}

    @property
    def changed(self) -> Collection[str]:
        """The weights and biases of the modules it has tensors for, once `settle` has found them."""
        return self._touched

    def settle(self, facts: Architecture, headers: Mapping[str, TensorHeader]) -> None:
        """Find the tensors it changes: those of the innermost module of the base that each of its own tensors lies in."""
        names = {name.removeprefix("base_model.model."): name for name in self.checkpoint.headers}
        owners = {own: _owners(own) for own in names}
        pairs = [(f"{owner}.weight", f"{owner}.bias") for held in owners.values() for owner in held]
        mapping = align({*names, *chain.from_iterable(pairs)}, headers, facts.stored_names)
        for own, name in names.items():
            found = [n for owner in owners[own] for n in (f"{owner}.weight", f"{owner}.bias") if n in mapping]
            if own in mapping or (not found and own.endswith((".weight", ".bias"))):
                self.saved[own] = name
            elif found:
                module = found[0].rpartition(".")[0]
                touched = [n for n in found if n.rpartition(".")[0] == module]
                self._touched |= {n: headers[mapping[n]].shape for n in touched}

    def shape(self, own: str) -> tuple[int, ...]:
        """Return the shape of a tensor it changes."""
        return self._touched[own]

    def delta(self, own: str) -> DenseDelta:
        """Return what PEFT's merge changes at one tensor."""
        assert self.deltas is not None, "fold it first"
        return DenseDelta(self.deltas.tensor(own))


def _owners(name: str) -> list[str]:
    """Return the modules that a tensor may lie in, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def at_least_float32(tensor: Any) -> Any:
    """Return a tensor in float32 if it is stored in less."""
    return tensor if tensor.dtype.itemsize > 4 else tensor.float()
