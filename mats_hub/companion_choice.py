"""Whose tokenizer, processor and generation config a merged model has."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mats_hub.companions import companions_of
from mats_hub.errors import MatsError
from mats_hub.plan import Plan
from mats_hub.source import Source, open_source

TOKENIZER_FILE = "tokenizer.json"


def choose_companions(plan: Plan, vocabulary: Collection[str]) -> list[Source]:
    """Return where tokenizer, processor and generation config come from: the first that has some.

    That is the reference, unless the recipe names another; or an expert, where all of them were taught to talk in another
    way than the reference does, as chat models trained from a base that has no chat template.

    Args:
        plan: a problem with what the recipe names, and notes on where experts differ, are added to it.
        vocabulary: the reference's tensors whose rows are its tokens.

    """
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
    talking = [(expert, _talk(expert.source)) for expert in plan.experts if companions_of(expert.source)]
    changed = {expert.name: names for expert, talk in talking if (names := _changed(given, talk))}
    if not changed:
        return usual
    what = " and ".join(next(iter(changed.values())))
    first = min(
        (expert.source for expert, _ in talking), key=lambda source: "generation_config.json" not in source.sizes
    )
    if all(talk == talking[0][1] for _, talk in talking) and _fits(plan, vocabulary, first):
        plan.notes.append(
            f"tokenizer and generation config are the experts', which agree on another {what} than the base"
        )
        return [first, *usual]
    named = " and ".join(map(repr, changed))
    plan.notes.append(
        f"the {what} of {named} differs from that of {plan.reference.source.public_spec!r}, whose tokenizer is kept; name "
        "another with 'tokenizer' (--tokenizer)"
    )
    return usual


def tokens_of(source: Source) -> dict[str, int]:
    """Return token → id from a tokenizer.json; empty when there is none, or it is of another form."""
    model = source.json(TOKENIZER_FILE).get("model")
    held = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(held, dict):
        return {str(token): index for token, index in held.items() if isinstance(index, int)}
    if isinstance(held, list):
        return {str(entry[0]): index for index, entry in enumerate(held) if isinstance(entry, list) and entry}
    return {}


def _fits(plan: Plan, vocabulary: Collection[str], source: Source) -> bool:
    """Tell whether a tokenizer gives the reference's tokens their ids, and none beyond the rows there are."""
    reference, own, added = plan.reference, tokens_of(source), source.json(TOKENIZER_FILE).get("added_tokens")
    ids = [*own.values(), *(token["id"] for token in added or () if isinstance(token, dict) and "id" in token)]
    rows = min((reference.headers[name].shape[0] for name in vocabulary), default=0)
    moved = any(own.get(token, at) != at for token, at in tokens_of(reference.source).items())
    return plan.recipe.vocabulary == "error" and bool(own) and not moved and max(ids) < rows


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
