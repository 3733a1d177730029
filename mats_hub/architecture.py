"""What a model's config says about its tensors: which are tied, which are stored transposed, which are the body."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

MOST_PIECES = 64
"""Of more pieces than this no tensor is told to be made."""


class Piece(NamedTuple):
    """Rows of a parameter that stand together in a tensor of a checkpoint.

    Attributes:
        parameter: whose rows they are.
        matrix: of a stack of experts' matrices, which of them; else 0.
        start: the first row.
        stop: behind the last row.

    """

    parameter: str
    matrix: int
    start: int
    stop: int


@dataclass(frozen=True)
class Architecture:
    """Facts read off an empty model built from a config.

    Attributes:
        class_name: the transformers class, '' when it is not known.
        prefix: where the body's tensors begin inside a model with a head (``bert.``), '' for a body alone or when not known.
        body: the same for the class that the body is of, whether this model has a head or not.
        tied: tensors that share the storage of another one: alias → the tensor that is stored.
        transposed: weights stored ``[in, out]`` (Conv1D).
        stored_names: name in the model → name in a checkpoint, where transformers stores it under another one; of modules'
            (IA)³ vectors, too.
        linear: weights of linear modules (Linear, Conv1D).
        stacked: parameters that stack the matrices of several experts, in the order of their modules → how many there
            are, and whether each is ``[in, out]``.
        pieces: tensors that a checkpoint makes of the rows of parameters, where that is more than another name: of one matrix of
            a stack, of several parameters, or of one's in another order → those rows, in order.
        vocabulary: tensors whose rows are the vocabulary's tokens: embeddings, and the head and the bias over tokens.
        shapes: every tensor's shape, by its name in a checkpoint; tied ones are named too.

    """

    class_name: str = ""
    prefix: str = ""
    body: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    stored_names: Mapping[str, str] = field(default_factory=dict)
    linear: frozenset[str] = frozenset()
    stacked: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    vocabulary: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def model_names(self) -> dict[str, str]:
        """Name in a checkpoint → name in the model, where that is another one."""
        return {stored: name for name, stored in self.stored_names.items()}


def describe(config: Mapping[str, Any]) -> Architecture:
    """Return the facts about the model a config describes; empty facts for a model transformers does not know.

    No weight is allocated and no code from a repository is run. The facts are kept in the Hub client's cache of assets: to
    import a model's class takes longer than to average small models.
    """
    return _recalled(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=16)
def _recalled(config_text: str) -> Architecture:
    from pydantic import TypeAdapter

    stored = TypeAdapter(Architecture)
    with suppress(OSError, ValueError):
        return stored.validate_json(_kept_at(config_text).read_bytes())
    found = _described(json.loads(config_text))
    if found.shapes:  # those that are not known may be so with other packages
        with suppress(OSError, ValueError), TemporaryDirectory(dir=_kept_at(config_text).parent) as folder:
            whole = Path(folder) / "facts.json"
            whole.write_bytes(stored.dump_json(found))
            os.replace(whole, _kept_at(config_text))
    return found


def _kept_at(config_text: str) -> Path:
    """Return where the facts of a config are kept that this code and the installed transformers read off it."""
    from huggingface_hub import cached_assets_path

    versions = f"{version('transformers')}\0{version('torch')}".encode()
    digest = hashlib.sha256(b"\0".join((Path(__file__).read_bytes(), versions, config_text.encode()))).hexdigest()
    return cached_assets_path("mats_hub", "architectures") / f"{digest}.json"


def _described(config: dict[str, Any]) -> Architecture:
    class_name = (config.get("architectures") or [""])[0]
    model = _skeleton(config, class_name)
    if model is None:
        return Architecture(class_name)
    import torch
    from transformers.pytorch_utils import Conv1D

    def weights_of(*kinds: type) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds))

    body = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    stored_names = _stored_names(model)
    return Architecture(
        class_name,
        prefix=body if model.base_model is not model else "",
        body=body,
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}) if _ties(config) else {},
        transposed=weights_of(Conv1D),
        stored_names=stored_names,
        linear=weights_of(torch.nn.Linear, Conv1D),
        stacked=stacked_parameters(model),
        pieces=stored_pieces(model),
        vocabulary=_vocabulary(model),
        shapes={stored_names.get(name, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    )


def stacked_parameters(model: Any) -> dict[str, tuple[int, bool]]:
    """Return the parameters that stack the matrices of several experts → how many, and whether each is ``[in, out]``."""
    from torch import nn

    return {
        f"{name}.{leaf}".removeprefix("."): (len(parameter), bool(getattr(module, "is_transposed", False)))
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
    }


def _vocabulary(model: Any) -> frozenset[str]:
    modules = [module for module in (_embeddings(model, "input"), _embeddings(model, "output")) if module is not None]
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.shape[:1] == (size,) and (id(parameter) in held or parameter.dim() == 1)
    )


def _embeddings(model: Any, which: str) -> Any:
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (NotImplementedError, AttributeError):  # a model that has none, such as one of images
        return None


def _stored_names(model: Any) -> dict[str, str]:
    """Return the names that saving would change: a tensor is followed through transformers' own renaming."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers renamed tensors, names were the same on both sides
        return {}
    state = model.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, state)
    pairs = ((names.get(id(tensor)), name) for name, tensor in stored.items())
    found = {name: other for name, other in pairs if name is not None and name != other}
    return found | {vector_of(name): vector_of(other) for name, other in found.items() if name.endswith(".weight")}


def stored_pieces(model: Any) -> dict[str, tuple[Piece, ...]]:
    """Return `Architecture.pieces` of a model: all rows are numbered, and the numbers followed through transformers' renaming."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    stacks, found = stacked_parameters(model), {}
    groups: dict[str, dict[str, tuple[int, ...]]] = {}  # a layer at a time: the numbers of all would fill the memory
    for name, parameter in model.named_parameters():
        if name in stacks or parameter.dim() in (1, 2):
            layer = re.split(r"(?<=\.)\d+\.", name, maxsplit=1)
            groups.setdefault(name[: -len(layer[1])] if len(layer) > 1 else "", {})[name] = tuple(parameter.shape)
    for shapes in groups.values():
        numbered = _Numbered(shapes, stacks)
        for other, part in revert_weight_conversion(model, dict(numbered.tensors)).items():
            pieces = numbered.pieces(part)
            if pieces:
                found[other] = pieces
    return found


class _Numbered:
    """Parameters with the numbers of their rows in the place of their entries."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], stacks: Collection[str]) -> None:
        import torch

        self.tensors: dict[str, Any] = {}
        self._rows: list[int] = []
        self._firsts: list[int] = []
        count = 0
        for name, shape in shapes.items():
            rows = shape[:2] if name in stacks else shape[:1]
            numbers = torch.arange(count, count + math.prod(rows), dtype=torch.float64)
            self.tensors[name] = numbers.reshape(*rows, *(1 for _ in shape[len(rows) :]))
            self._rows.append(rows[-1])
            self._firsts.append(count)
            count += math.prod(rows) + 1  # one is left out, so that no run of numbers goes on into the next

    def pieces(self, part: Any) -> tuple[Piece, ...]:
        """Return what a tensor was made of; nothing where it is a whole parameter, or no rows that stand together."""
        import torch

        held, found = part.flatten(), []
        breaks = torch.nonzero(held.diff() != 1).flatten()
        if len(part) != len(held) or len(breaks) >= MOST_PIECES:
            return ()
        names = list(self.tensors)
        for start, stop in pairwise([0, *(int(edge) + 1 for edge in breaks), len(held)]):
            at = bisect_right(self._firsts, int(held[start])) - 1
            index, first = divmod(int(held[start]) - self._firsts[at], self._rows[at])
            found.append(Piece(names[at], index, first, first + stop - start))
            if found[-1].stop > self._rows[at]:
                return ()
        whole = len(found) == 1 and len(held) == self.tensors[found[0].parameter].numel()
        return () if whole else tuple(found)


def vector_of(weight: str) -> str:
    """Return the name of the (IA)³ vector of a module, from its weight's."""
    return f"{weight.removesuffix('weight')}ia3_l"


def _ties(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def transformers_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' object of a config.json's content; raises whatever its kind of model finds wrong with it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_with_floats(dict(config)))


def filled_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what transformers takes for the fields that it leaves out."""
    if not config.get("model_type"):
        return dict(config)
    try:
        return dict(transformers_config(config).to_dict())
    except Exception:  # not a config of this version of transformers: taken as it is written
        return dict(config)


def part_config(whole: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a config says of its part of another's kind, as CLIP's of the encoder that sees; None where it has none."""
    kind = part.get("model_type")
    if not kind or kind == whole.get("model_type"):
        return None
    held = (value for value in filled_config(whole).values() if isinstance(value, dict))
    return next((value for value in held if value.get("model_type") == kind), None)


def part_tensors(whole: Mapping[str, Any], class_name: str, names: Collection[str]) -> dict[str, str]:
    """Return, of the part of a model that a class is, its tensors' names in that class → in the whole; none of another class.

    All of them together tell which part it is: several may have layers of the same names.
    """
    if not class_name:
        return {}
    import transformers

    kind = getattr(getattr(getattr(transformers, class_name, None), "config_class", None), "model_type", None)
    part = part_config(whole, {"model_type": kind})
    facts = describe({**part, "architectures": [class_name]}) if part else Architecture()
    return align(facts.shapes, names, facts.stored_names)


def _with_floats(value: Any) -> Any:
    """Put the floats that JSON does not have in the place of what transformers writes for them."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {name: _with_floats(held) for name, held in value.items()}
    return [_with_floats(held) for held in value] if isinstance(value, list) else value


def _skeleton(config: dict[str, Any], class_name: str) -> Any:
    import torch
    import transformers

    model_class = getattr(transformers, class_name, None)
    if not config.get("model_type") or not hasattr(model_class, "base_model_prefix"):
        return None
    assert model_class is not None
    try:
        parsed = transformers_config(config)
        with torch.device("meta"):
            return model_class(parsed)
    except Exception:  # a config this version of transformers cannot build: every fact stays unknown
        return None


LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def align(
    names: Iterable[str], reference: Collection[str], stored_names: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Map tensor names of one checkpoint or model to those of another that holds the same body.

    A model with a head stores ``bert.encoder…`` where the bare body stores ``encoder…``; old checkpoints call LayerNorm's
    parameters gamma and beta; modules may be called otherwise in the model than in its checkpoint. The one prefix to drop
    or add that maps the most names is taken for all of them.

    Args:
        names: the names to map.
        reference: the names to map to.
        stored_names: name in the model → name in a checkpoint, tried in both directions.

    Returns:
        name → reference name, for the names that have a counterpart.

    """
    return readings(names, reference, stored_names)[0]


def readings(
    names: Iterable[str], reference: Collection[str], stored_names: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Return every result of `align` that maps the most names: several, where parts of a model have layers of the same names."""
    names, known = list(names), {_modern(name): name for name in reference}
    plain = {name: _modern(name) for name in names}
    stored = dict(stored_names or {})
    in_model = {other: name for name, other in stored.items()}
    candidates = [("", "")]
    candidates += [(prefix, "") for prefix in _prefixes(plain.values())]
    candidates += [("", prefix) for prefix in _prefixes([*known, *stored, *in_model])]

    def mapped(drop: str, put: str) -> dict[str, str]:
        found = {}
        for name, modern in plain.items():
            moved = put + modern.removeprefix(drop)
            for other in (moved, stored.get(moved), in_model.get(moved)):
                if other in known:
                    found[name] = known[other]
                    break
        return found

    best: list[dict[str, str]] = []
    for candidate in candidates:
        found = mapped(*candidate)
        if not best or len(found) > len(best[0]):
            best = [found]
        elif len(found) == len(best[0]) and found not in best:
            best.append(found)
    return best


def _prefixes(names: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for depth in (1, 2):
            if len(parts) > depth:
                found[".".join(parts[:depth]) + "."] = None
    return list(found)


def _modern(name: str) -> str:
    for old, new in LEGACY_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def layer_pattern(name: str) -> str:
    """Return a tensor's name with its layer numbers blanked (``encoder.layer.*.attention``)."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
