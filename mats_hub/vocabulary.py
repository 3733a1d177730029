"""Experts whose vocabulary or config differs from the reference's: what is told, refused, or settled by the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mats_hub.architecture import align, describe, filled_config, part_config
from mats_hub.companion_choice import TOKENIZER_FILE, tokens_of
from mats_hub.errors import IncompatibleExperts
from mats_hub.plan import Plan
from mats_hub.source import Source

UNTOLD = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "vocab_size"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "use_cache"),
    *("return_dict", "output_hidden_states", "output_attentions", "gradient_checkpointing", "quantization_config"),
}
"""Config fields that differ for good reasons, or do not change what the weights mean."""


def tell_config_differences(plan: Plan) -> None:
    """Note the config fields (position embeddings, rope, special tokens, …) in which an expert differs from the reference."""
    for expert in plan.experts:
        given = part_config(plan.reference.config, expert.config) or plan.reference.config
        if not expert.config or not given or _told(expert.config) == _told(given):
            continue
        own, reference = filled_config(expert.config), filled_config(given)
        changed = [
            f"{name} {reference.get(name)!r} → {own.get(name)!r}"
            for name in sorted({*own, *reference} - UNTOLD)
            if own.get(name) != reference.get(name)
        ]
        if changed:
            plan.notes.append(
                f"the config of expert {expert.name!r} differs from {plan.reference.source.public_spec!r}, whose is kept: "
                + "; ".join(changed)
            )


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in UNTOLD}


class Vocabulary:
    """The tensors whose rows are the vocabulary's tokens, and what the recipe does where experts differ in them.

    Attributes:
        names: these tensors, as the reference calls them.

    """

    def __init__(self, plan: Plan) -> None:
        facts, reference = describe(plan.reference.config), plan.reference
        self._plan, self._policy = plan, plan.recipe.vocabulary
        self.names = set(align(facts.vocabulary, reference.headers, facts.stored_names).values())
        self._differing: dict[str, str] = {}
        self._check_tokens()

    def differs(self, key: str) -> bool:
        """Tell whether some expert has other rows of a vocabulary's tensor than the reference, and the same columns."""
        plan = self._plan
        own = [(expert, expert.names[key]) for expert in plan.experts if expert.holds(key)]
        shape = plan.reference.headers[key].shape
        shapes = [(expert, name, expert.shape(name)) for expert, name in own if expert.shape(name) != shape]
        if key not in self.names or not shapes:
            return False
        if any(other[1:] != shape[1:] or name not in expert.whole for expert, name, other in shapes):
            return False
        for expert, _, other in shapes:
            self._differing.setdefault(expert.name, f"{key!r} has {other[0]} rows, not {shape[0]}")
        return True

    def settle(self, key: str) -> str:
        """Do what the recipe says with a tensor that differs; return it in words, '' to keep the reference's rows."""
        if self._policy != "common":
            return ""
        holders = [expert for expert in self._plan.experts if expert.holds(key)]
        rows = min(expert.shape(expert.names[key])[0] for expert in holders)
        rows = min(rows, self._plan.reference.headers[key].shape[0])
        for expert in holders:
            expert.rows[key] = rows
        return f"the first {rows} rows, which all have; the rest is the base's"

    def refuse(self) -> None:
        """Add a problem for each expert that differs, where the recipe does not say what is to be done."""
        plan = self._plan
        if self._policy == "common" and self._differing and plan.base is None:
            plan.problems.append(
                IncompatibleExperts(
                    "vocabulary 'common' takes the rows that not all experts have from the base, and there is none; name it "
                    "with 'base' (--base)"
                )
            )
        for name, said in self._differing.items() if self._policy == "error" else ():
            plan.problems.append(
                IncompatibleExperts(
                    f"expert {name!r} has another vocabulary than {plan.reference.source.spec!r}: {said}. Keep the base's rows "
                    "(--vocabulary base), merge the rows that all have and keep the base's others (--vocabulary common), or "
                    "leave the expert out"
                )
            )

    def _check_tokens(self) -> None:
        """Refuse experts whose tokenizer gives a token of the reference another id: their embeddings mean something else."""
        plan = self._plan
        merged = [e for e in plan.experts if any(e.holds(key) and e.names[key] in e.whole for key in self.names)]
        theirs = tokens_of(plan.reference.source) if merged else {}
        for expert in merged if theirs and self._policy != "base" else ():
            if expert.source is plan.reference.source or _same_file(expert.source, plan.reference.source):
                continue
            own = tokens_of(expert.source)
            moved = [(token, own[token], at) for token, at in theirs.items() if own.get(token, at) != at]
            if moved:
                token, here, there = min(moved, key=lambda found: found[2])
                plan.problems.append(
                    IncompatibleExperts(
                        f"expert {expert.name!r} has another tokenizer than {plan.reference.source.spec!r}: {len(moved)} tokens "
                        f"have other ids, such as {token!r} {here} instead of {there}. Their embeddings cannot be merged: keep "
                        "the base's (--vocabulary base), or leave the expert out"
                    )
                )


def _same_file(one: Source, other: Source) -> bool:
    digests = [source.digests.get(TOKENIZER_FILE) for source in (one, other)]
    return digests[0] is not None and digests[0] == digests[1]
