"""Experts: a full checkpoint or an adapter behind one face, their task vectors addressed by the reference's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mats_hub.adapter import TASK_CLASSES, Adapter, FoldedAdapter
from mats_hub.adapter_opening import open_adapter
from mats_hub.architecture import Architecture, align, describe, part_config, part_tensors, readings
from mats_hub.checkpoint import Checkpoint
from mats_hub.delta import Delta, DenseDelta
from mats_hub.errors import IncompatibleExperts
from mats_hub.lora import LoraAdapter
from mats_hub.source import Source
from mats_hub.tensor_header import TensorHeader


class Expert:
    """One fine-tuned model.

    Attributes:
        name: what its task is called in the merged model.
        weight: how much it counts.
        source: where its files are.
        adapter: its adapter, or None for a full checkpoint.
        names: reference tensor → the expert's own name for it; filled by `align_to`.
        rows: reference tensor → how many of its leading rows are merged, where that is not all of them.
        part: of an expert of but a part of the reference, what the part's tensors are called in it → in the reference; likewise.
        extra: the expert's own tensors that the reference does not have (heads), held whole.

    Raises:
        CheckpointError: its files are not a well-formed checkpoint or adapter.

    """

    def __init__(self, source: Source, name: str, weight: float = 1.0) -> None:
        self.source, self.name, self.weight = source, name, weight
        self.adapter: Adapter | None = open_adapter(source) if "adapter_config.json" in source.sizes else None
        self.checkpoint = self.adapter.checkpoint if self.adapter else Checkpoint(source)
        self._as_named = {name: name for name in self.checkpoint.headers}
        self.names: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.extra: list[str] = []
        self.part: dict[str, str] = {}

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return self.adapter.description if self.adapter else "full checkpoint"

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json; empty for an adapter without one."""
        return self.checkpoint.config

    @property
    def whole(self) -> dict[str, str]:
        """Tensors it holds whole: its own name for them → their name in the file."""
        return self.adapter.saved if self.adapter else self._as_named

    def align_to(self, reference: Checkpoint) -> None:
        """Find the expert's own name for each tensor of the reference, following prefixes, renamings and tied weights."""
        facts = describe(reference.config)
        known: Mapping[str, TensorHeader] = reference.headers
        if self.adapter:
            self.part = part_tensors(reference.config, self.adapter.model_class, known)
            known = {name: known[name] for name in self.part.values()} or known
            self.adapter.settle(facts, known)
            known = self._told_apart(known, facts)
        own = [*self.whole, *(self.adapter.changed if self.adapter else ())]
        stored_names = {**self.architecture.stored_names, **facts.stored_names}
        mapping = align(own, known, stored_names)
        if not self.adapter:
            self.part = mapping if self.is_part_of(reference.config) else {}
        self.names = {target: name for name, target in mapping.items()}
        tied = {} if self.adapter else self.architecture.tied
        for alias, stored in tied.items():
            if alias in reference.headers and alias not in self.names and stored in self.checkpoint.headers:
                self.names[alias] = stored
        self.extra = [name for name in own if name not in mapping and name not in tied]

    def _told_apart(self, known: Mapping[str, TensorHeader], facts: Architecture) -> Mapping[str, TensorHeader]:
        """Return the tensors of the part that an adapter's shapes fit, where several parts have layers of these names."""
        assert self.adapter is not None
        changed = self.adapter.changed
        found = readings(changed, known, facts.stored_names)
        if len(found) < 2 or not found[0]:
            return known
        fitting = [one for one in found if all(self.shape(own) == known[to].shape for own, to in one.items())]
        if len(fitting) != 1:
            own = next(iter(found[0]))
            raise IncompatibleExperts(
                f"adapter {self.source.spec!r} fits several parts of its base: {own!r} may be "
                f"{' or '.join(repr(one[own]) for one in found if own in one)}. Train or load it in the whole model and save it "
                "again, or name its class in adapter_config.json (auto_mapping: base_model_class)"
            )
        self.part = fitting[0]
        return {name: known[name] for name in self.part.values()}

    @property
    def architecture(self) -> Architecture:
        """What its config says of its tensors."""
        return describe(self.config)

    def name_as_stored(self, reference: Checkpoint) -> None:
        """Name what an adapter changes as the reference stores it: experts' matrices one by one, several weights as one."""
        if not isinstance(self.adapter, LoraAdapter):
            return
        pieces = describe(reference.config).pieces
        self.adapter.as_stored({name: pieces[name] for name in align(pieces, reference.headers)})
        self.align_to(reference)

    def is_part_of(self, config: Mapping[str, Any]) -> bool:
        """Tell whether it is a part alone of the model that a config describes, as the encoder of CLIP that sees."""
        return not self.adapter and part_config(config, self.config) is not None

    def shape(self, own: str) -> tuple[int, ...]:
        """Return the shape of the weight behind one of its own names."""
        if self.adapter and own in self.adapter.changed:
            return self.adapter.shape(own)
        return self.checkpoint.headers[self.whole[own]].shape

    def files(self, own: str) -> tuple[str, ...]:
        """Return the names, in its file, of the tensors behind one of its own names."""
        if self.adapter and own in self.adapter.changed:
            return self.adapter.files(own)
        return (self.whole[own],)

    def holds(self, key: str) -> bool:
        """Tell whether it holds or changes a reference tensor; an adapter leaves the others as they are in the base."""
        return key in self.names

    def whole_tensor(self, own: str) -> Tensor:
        """Return a tensor it holds whole, by its own name, as stored."""
        return self.checkpoint.tensor(self.whole[own])

    def fold(self) -> None:
        """Treat an adapter as whatever PEFT's merge makes of it; `mats_hub.loading.fold` makes it."""
        if self.adapter:
            self.adapter = FoldedAdapter(self.adapter.checkpoint, self.adapter.options)

    def delta(self, key: str, origin: Tensor) -> Delta | None:
        """Return the task vector at a reference tensor, from `origin` (float32); None where an adapter changes nothing."""
        own = self.names.get(key)
        if own is None:
            return None
        if self.adapter and own in self.adapter.changed:
            return self.adapter.delta(own)
        if key in self.rows:
            delta, count = torch.zeros_like(origin), self.rows[key]
            delta[:count] = self.whole_tensor(own)[:count].to(origin) - origin[:count]
            return DenseDelta(delta)
        return DenseDelta(self.whole_tensor(own).to(origin) - origin)

    def task_config(self, base_config: dict[str, Any]) -> dict[str, Any]:
        """Return the config that, with the merged body and this expert's head, gives back its model."""
        if self.part:
            return dict(base_config)
        if self.config or not self.adapter:
            return self.config
        config = dict(base_config)
        heads = [self.shape(own) for own in self.extra if own in self.whole and own.endswith(".weight")]
        if self.adapter.options.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and heads:
            count = heads[-1][0]
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
        return config

    @property
    def auto_class(self) -> str:
        """The transformers class that loads this expert: its own, or its adapter's task type's; '' is the base's."""
        if self.part:
            return ""
        if self.adapter and not self.config:
            return TASK_CLASSES.get(str(self.adapter.options.get("task_type")), "")
        return self.architecture.class_name or "AutoModel"
