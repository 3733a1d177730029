"""Measuring a model's statistics, batch by batch, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mats_hub.errors import NumericalError, StatisticsError
from mats_hub.statistics.accumulate import Sums
from mats_hub.statistics.sketch import Sketch
from mats_hub.statistics.watch import MAX_FEATURES, Watch, has_experts

IGNORED = -100
"""The label that transformers' losses leave out."""

NO_EXAMPLE = "there is no example to measure statistics on"
Batch = dict[str, Any]
LossFunction = Callable[[nn.Module, Batch], Tensor]
ForwardFunction = Callable[[nn.Module, Batch], Any]
MaskFunction = Callable[[Batch], list[Tensor]]


@dataclass(frozen=True)
class Survey:
    """What one batch tells of how a model treats its inputs.

    Attributes:
        aliases: module → the module that reads the same input before it.
        widths: module that has an input Gram → its number of features.
        out_widths: module that has an output Gram → its number of features.
        found: uses of parameters, axes of tokens, and whether embeddings are looked up once for each token.
        singly: whether examples have to be taken one by one; None where the batch had only one.

    """

    aliases: dict[str, str]
    widths: dict[str, int]
    out_widths: dict[str, int]
    found: Sums
    singly: bool | None

    def start(self, only: Collection[str] | None, sketch: Sketch | None, gradients: bool) -> Sums:
        """Return empty sums, with the probes of the parameters `only` where Grams are sketched."""
        uses = self.found.uses.items()
        watched = {module for name, found in uses if only is None or name in only for _, module in found}
        sums = Sums(
            aliases={name: leader for name, leader in self.aliases.items() if name in watched},
            per_token=dict(self.found.per_token),
            token_axis=dict(self.found.token_axis),
        )
        if sketch is None:
            return sums
        for leader, width in self.widths.items():
            if leader in watched and leader not in sums.aliases:
                members = [leader, *(name for name, other in sums.aliases.items() if other == leader)]
                sums.probes[f"{leader}.input"] = sketch.probes(members, width)
        plain = Sketch(sketch.rank, {}, sketch.seed)
        for module, width in self.out_widths.items() if gradients else ():
            if module in watched:
                sums.probes[f"{module}.output"] = plain.probes([f"{module}.output"], width)
        return sums


def survey(
    model: nn.Module,
    batch: Batch,
    masks: MaskFunction = lambda batch: [],
    only: Collection[str] | None = None,
    singly: bool | None = None,
    forward: ForwardFunction | None = None,
) -> Survey:
    """See with the longest example of a batch what a model does with its parameters, and with all whether it mixes examples."""
    with measuring(model):
        found = Sums()
        watch, trial = _trial(model, max(_without_padding(batch), key=_length), found, masks, only, forward)
        found.uses = trial.uses
        if singly is None and _batch_size(batch) > 1:
            singly = _mixes_examples(model, batch, found, masks, only, forward)
    return Survey(watch.aliases(), watch.widths, watch.out_widths, found, singly)


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    kinds: Collection[str],
    loss: LossFunction,
    masks: MaskFunction = lambda batch: [],
    only: Collection[str] | None = None,
    sketch: Sketch | None = None,
    seen: Survey | None = None,
    sums: Sums | None = None,
    after: Callable[[Sums], None] = lambda sums: None,
    forward: ForwardFunction | None = None,
) -> Sums:
    """Return the sums behind curvatures of the given kinds.

    Args:
        model: the expert; it runs in eval mode; its modules' ``training`` and parameters' ``requires_grad`` are left as found.
        batches: model inputs with tensors whose first dimension is the example, on the model's device.
        kinds: any of ``gram``, ``kfac``, ``fisher``, ``block_fisher``. ``gram`` alone needs no labels and no backward pass.
        loss: (model, batch) → the sum over the batch's examples of the model's loss on each example alone.
        masks: batch → boolean masks ``[batch, length]`` of the tokens that count, one for each kind of sequence; inputs
            of another shape count whole.
        only: the parameters to measure; all when None.
        sketch: how to sketch input Grams, when they are not to be held whole.
        seen: how the model treats its inputs; told by the first batch, and the first of several examples, otherwise.
        sums: what to add to, of batches before these; nothing otherwise.
        after: called with the sums after every batch.
        forward: how the model is called where no gradients are wanted, if not with the batch alone.

    Raises:
        NumericalError: a non-finite activation or gradient, naming the module.
        StatisticsError: there is no example.

    """
    grams, gradients = "gram" in kinds or "kfac" in kinds, "kfac" in kinds
    with measuring(model):
        for batch in batches:
            if grams and (seen is None or (seen.singly is None and _batch_size(batch) > 1)):
                seen = survey(model, batch, masks, only, forward=forward)
            if sums is None:
                sums = seen.start(only, sketch, gradients) if seen else Sums()
            if grams:
                for part in _without_padding(batch) if seen and seen.singly else [batch]:
                    _add_grams(model, part, sums, gradients, loss, masks, only, forward)
            if "fisher" in kinds or "block_fisher" in kinds:
                _add_fisher(model, batch, sums, kinds, loss, only)
            sums.examples += _batch_size(batch)
            after(sums)
    if sums is None:
        raise StatisticsError(NO_EXAMPLE)
    for key, value in sums.tensors.items():
        if not torch.isfinite(value).all():
            raise NumericalError(f"statistics {key!r} are not finite: the expert's activations or gradients overflow")
    return sums


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Put a model in the state it is measured in, and back into the one it was in."""
    training = {module: module.training for module in model.modules()}
    required = {p: p.requires_grad for p in model.parameters()}
    config = getattr(model, "config", None)
    fused = getattr(config, "_experts_implementation", None)
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    caching = {id(held): held for held in configs if getattr(held, "use_cache", False)}
    model.eval()
    try:
        for held in caching.values():
            held.use_cache = False  # nothing is generated after what is measured
        if fused and config is not None:  # one matrix after another, so that it is seen which tokens each one gets
            config._experts_implementation = "eager"
        yield
    finally:
        if fused and config is not None:
            config._experts_implementation = fused
        for held in caching.values():
            held.use_cache = True
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def _batch_size(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def _example(batch: Batch, index: int) -> Batch:
    if _batch_size(batch) == 1:  # what comes with it may have other first dimensions
        return batch
    return {key: value[index : index + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}


def _without_padding(batch: Batch) -> list[Batch]:
    """Return the examples one by one, each side of theirs cut to its own tokens."""
    found = []
    for index in range(_batch_size(batch)):
        example = _example(batch, index)
        mask, labels = example.get("attention_mask"), example.get("labels")
        cut = {}
        if mask is not None and mask.dim() == 2:  # choices are several rows of one example
            cut = {key: int(mask.sum()) for key, v in example.items() if _same_shape(v, mask)}
        if labels is not None and labels.dim() == 2 and "labels" not in cut and not labels.is_floating_point():
            cut["labels"] = int((labels != IGNORED).sum())
        found.append({key: value[:, : cut[key]] if key in cut else value for key, value in example.items()})
    return found


def _length(example: Batch) -> int:
    """Return the length of an example's shortest sequence: of one token, it cannot be told from its pairs of tokens."""
    return min((v.shape[1] for v in example.values() if isinstance(v, Tensor) and v.dim() == 2), default=0)


def _same_shape(value: Any, mask: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == mask.shape


def _add_grams(
    model: nn.Module,
    batch: Batch,
    sums: Sums,
    gradients: bool,
    loss: LossFunction,
    masks: MaskFunction,
    only: Collection[str] | None,
    forward: ForwardFunction | None,
) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with Watch(model, sums, gradients, masks(batch), _batch_size(batch), only), torch.set_grad_enabled(gradients):
        if gradients:
            value = loss(model, batch)
        else:
            (forward or _forward)(model, batch)
    if gradients and value.requires_grad:  # not so where nothing that is measured was reached
        value.backward()


def _forward(model: nn.Module, batch: Batch) -> None:
    model(**{key: value for key, value in batch.items() if key != "labels" or _needs_labels(model)})


def _trial(
    model: nn.Module,
    batch: Batch,
    sums: Sums,
    masks: MaskFunction,
    only: Collection[str] | None,
    forward: ForwardFunction | None,
) -> tuple[Watch, Sums]:
    """Run a batch without adding to any sums; what is found of its embeddings and axes is kept in `sums`."""
    found = Sums(per_token=sums.per_token, token_axis=sums.token_axis)
    with torch.no_grad(), Watch(model, found, False, masks(batch), _batch_size(batch), only, trial=True) as watch:
        (forward or _forward)(model, batch)
    return watch, found


def _mixes_examples(
    model: nn.Module,
    batch: Batch,
    sums: Sums,
    masks: MaskFunction,
    only: Collection[str] | None,
    forward: ForwardFunction | None,
) -> bool:
    """Tell whether a batch has to be taken apart, its examples one by one and without padding.

    That is so where the model mixes the tokens of several examples, or computes something once for all of them: then its
    modules do not see as many rows together as they see one by one.
    """
    if has_experts(model):
        return True
    apart: dict[str, int] = {}
    for example in _without_padding(batch):
        tokens = _trial(model, example, sums, masks, only, forward)[1].tokens
        apart = {name: apart.get(name, 0) + tokens.get(name, 0) for name in {**apart, **tokens}}
    return _trial(model, batch, sums, masks, only, forward)[1].tokens != apart


def _needs_labels(model: nn.Module) -> bool:
    # An encoder-decoder makes its decoder's input from the labels.
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _add_fisher(
    model: nn.Module,
    batch: Batch,
    sums: Sums,
    kinds: Collection[str],
    loss: LossFunction,
    only: Collection[str] | None,
) -> None:
    parameters = {
        name: p.requires_grad_(True)
        for name, p in model.named_parameters()
        if p.is_floating_point() and (only is None or name in only)
    }
    for index in range(_batch_size(batch)):
        value = loss(model, _example(batch, index))
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            flat = torch.zeros_like(parameter) if gradient is None else gradient
            if "fisher" in kinds:
                sums.add(f"{name}.fisher", flat.square().to(torch.float32))
            if "block_fisher" in kinds and flat.numel() == max(flat.shape) <= MAX_FEATURES:
                sums.add_rows(f"{name}.block_fisher", flat.reshape(1, -1))
