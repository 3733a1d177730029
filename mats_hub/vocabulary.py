"""Experts whose vocabulary or config differs from the reference's: what is told, refused, or settled by the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mats_hub.architecture import align, describe, transformers_config
from mats_hub.companions import companions_of
from mats_hub.errors import IncompatibleExperts, MatsError
from mats_hub.plan import Plan
from mats_hub.source import Source, open_source

TOKENIZER_FILE = "tokenizer.json"

UNTOLD = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "vocab_size"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "use_cache"),
    *("return_dict", "output_hidden_states", "output_attentions", "gradient_checkpointing", "quantization_config"),
}
"""Config fields that differ for good reasons, or do not change what the weights mean."""


def tell_config_differences(plan: Plan) -> None:
    """Note the config fields (position embeddings, rope, special tokens, …) in which an expert differs from the reference."""
    given = plan.reference.config
    for expert in plan.experts:
        if not expert.config or not given or _told(expert.config) == _told(given):
            continue
        own, reference = _filled(expert.config), _filled(given)
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


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what transformers takes for the fields that it leaves out."""
    if not config.get("model_type"):
        return dict(config)
    try:
        return dict(transformers_config(config).to_dict())
    except Exception:  # not a config of this version of transformers: compared as it is written
        return dict(config)


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

    def companions(self) -> list[Source]:
        """Return where tokenizer, processor and generation config come from: the first that has some.

        That is the reference, unless the recipe names another; or an expert, where all of them were taught to talk in another
        way than the reference does, as chat models trained from a base that has no chat template.
        """
        plan = self._plan
        usual = [plan.reference.source, *(expert.source for expert in plan.experts)]
        if plan.recipe.tokenizer:
            try:
                return [open_source(plan.recipe.tokenizer, plan.experts[0].source.token)]
            except MatsError as error:
                plan.problems.append(error)
                return usual
        if not companions_of(plan.reference.source):
            return usual
        given = _talk(plan.reference.source)
        talking = {e.name: (e.source, _talk(e.source)) for e in plan.experts if companions_of(e.source)}
        others = {name: _changed(given, talk) for name, (_, talk) in talking.items()}
        if not any(others.values()):
            return usual
        sources = sorted(
            (source for source, _ in talking.values()), key=lambda s: "generation_config.json" not in s.sizes
        )
        what = " and ".join(next(filter(None, others.values())))
        if all(talk == talking[next(iter(talking))][1] for _, talk in talking.values()) and self._fits(sources[0]):
            plan.notes.append(
                f"tokenizer and generation config are the experts', which agree on another {what} than the base"
            )
            return [sources[0], *usual]
        named = " and ".join(repr(name) for name, found in others.items() if found)
        plan.notes.append(
            f"the {what} of {named} differs from that of {plan.reference.source.public_spec!r}, whose tokenizer is kept; name "
            "another with 'tokenizer' (--tokenizer)"
        )
        return usual

    def _fits(self, source: Source) -> bool:
        """Tell whether a tokenizer gives the reference's tokens their ids, and none beyond the rows there are."""
        reference, own, added = self._plan.reference, _tokens(source), source.json(TOKENIZER_FILE).get("added_tokens")
        ids = [*own.values(), *(token["id"] for token in added or () if isinstance(token, dict) and "id" in token)]
        rows = min((reference.headers[name].shape[0] for name in self.names), default=0)
        moved = any(own.get(token, at) != at for token, at in _tokens(reference.source).items())
        return self._policy == "error" and bool(own) and not moved and max(ids) < rows

    def _check_tokens(self) -> None:
        """Refuse experts whose tokenizer gives a token of the reference another id: their embeddings mean something else."""
        plan = self._plan
        merged = [e for e in plan.experts if any(e.holds(key) and e.names[key] in e.whole for key in self.names)]
        theirs = _tokens(plan.reference.source) if merged else {}
        for expert in merged if theirs and self._policy != "base" else ():
            if expert.source is plan.reference.source or _same_file(expert.source, plan.reference.source):
                continue
            own = _tokens(expert.source)
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


def _talk(source: Source) -> dict[str, str]:
    """Return how one talks to a model: its chat template, and the token that ends a text, as far as it has them."""
    try:
        config = source.json("tokenizer_config.json")
        in_file = "chat_template.jinja" in source.sizes
        template = (
            source.path("chat_template.jinja").read_text(encoding="utf-8") if in_file else config.get("chat_template")
        )
    except (MatsError, UnicodeDecodeError):  # what cannot be read says nothing
        return {}
    end = config.get("eos_token")
    found = {"chat template": template, "end of text": end.get("content") if isinstance(end, dict) else end}
    return {name: value if isinstance(value, str) else repr(value) for name, value in found.items() if value}


def _changed(given: Mapping[str, str], talk: Mapping[str, str]) -> list[str]:
    return [name for name, value in talk.items() if value != given.get(name)]


def _same_file(one: Source, other: Source) -> bool:
    digests = [source.digests.get(TOKENIZER_FILE) for source in (one, other)]
    return digests[0] is not None and digests[0] == digests[1]


def _tokens(source: Source) -> dict[str, int]:
    """Return token → id from a tokenizer.json; empty when there is none, or it is of another form."""
    model = source.json(TOKENIZER_FILE).get("model")
    held = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(held, dict):
        return {str(token): index for token, index in held.items() if isinstance(index, int)}
    if isinstance(held, list):
        return {str(entry[0]): index for index, entry in enumerate(held) if isinstance(entry, list) and entry}
    return {}
