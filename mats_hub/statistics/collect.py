"""Measuring a model's statistics with hooks on its modules: no table of architectures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mats_hub.errors import NumericalError, StatisticsError
from mats_hub.statistics.accumulate import Sums
from mats_hub.statistics.sketch import Sketch

MAX_FEATURES = 16384
"""Modules with more inputs or outputs than this get no Gram: a vocabulary's output Gram alone would take gigabytes."""

Batch = dict[str, Any]
LossFunction = Callable[[nn.Module, Batch], Tensor]
MaskFunction = Callable[[Batch], list[Tensor]]


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    kinds: Collection[str],
    loss: LossFunction,
    masks: MaskFunction = lambda batch: [],
    only: Collection[str] | None = None,
    sketch: Sketch | None = None,
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

    Raises:
        NumericalError: a non-finite activation or gradient, naming the module.
        StatisticsError: there is no example.

    """
    training = {module: module.training for module in model.modules()}
    required = {p: p.requires_grad for p in model.parameters()}
    model.eval()
    sums = Sums()
    try:
        for batch in batches:
            if sketch is not None and not sums.examples:
                _draw_probes(model, batch, sums, masks, only, sketch)
            if "gram" in kinds or "kfac" in kinds:
                _add_grams(model, batch, sums, "kfac" in kinds, loss, masks, only)
            if "fisher" in kinds or "block_fisher" in kinds:
                _add_fisher(model, batch, sums, kinds, loss, only)
            sums.examples += _batch_size(batch)
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
    if not sums.examples:
        raise StatisticsError("there is no example to measure statistics on")
    for key, value in sums.tensors.items():
        if not torch.isfinite(value).all():
            raise NumericalError(f"statistics {key!r} are not finite: the expert's activations or gradients overflow")
    return sums


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that multiply by a weight of their own: Linear and Conv1D, without tied or very wide ones."""
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in seen:
            if max(module.weight.shape) <= MAX_FEATURES:
                found[name] = module
            seen.add(id(module.weight))
    return found


def transposed_modules(model: nn.Module) -> list[str]:
    """Return the modules that store their weight ``[in, out]``."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in linear_modules(model).items() if isinstance(module, Conv1D)]


def _batch_size(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


class _GramHooks:
    """Hooks of one forward (and backward) pass that add every linear module's Grams to `sums`."""

    def __init__(self, modules: dict[str, nn.Module], sums: Sums, gradients: bool, masks: Sequence[Tensor]) -> None:
        self._sums, self._gradients, self._masks = sums, gradients, masks
        self._last: tuple[Tensor | None, str] = (None, "")
        self._handles = []
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._on_input(name), with_kwargs=True))
            if gradients:
                self._handles.append(module.register_forward_hook(self._on_output(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_input(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = inputs[0] if inputs else next(iter(named.values()))
            rows = self._unmasked(x)
            self._sums.tokens[name] = self._sums.tokens.get(name, 0) + len(rows)
            # The last distinct input is kept alive, so its address cannot be taken by another tensor meanwhile.
            last, leader = self._last
            if last is None or not _same_tensor(last, x):
                leader = name
                self._last = (x, name)
            self._add_input(name, leader, rows)
            if self._gradients and not x.requires_grad:
                return (x.detach().requires_grad_(), *inputs[1:]), {} if not inputs else named
            return None

        return hook

    def _add_input(self, name: str, leader: str, rows: Tensor) -> None:
        known = self._sums.aliases.get(name)
        stored = any(f"{name}.input_{what}" in self._sums.tensors for what in ("gram", "product"))
        if known is None and leader != name and not stored:
            known = self._sums.aliases[name] = leader
        if known is None:
            self._sums.add_inputs(name, rows)
        elif known != leader:
            raise StatisticsError(
                f"module {name!r} read the same input as {known!r} at first and another one later; its path through the "
                "model depends on the data, which shared Grams cannot follow"
            )

    def _on_output(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(lambda gradient: self._sums.add_rows(f"{name}.output_gram", self._unmasked(gradient)))

        return hook

    def _unmasked(self, value: Tensor) -> Tensor:
        """Return the rows ``[n, features]`` of a module's input or output gradient that belong to real tokens."""
        for mask in self._masks:
            if value.dim() >= 3 and value.shape[:2] == mask.shape:
                return value[mask].reshape(-1, value.shape[-1])
            if value.dim() == 2 and len(value) == mask.numel() and len(value) != len(mask):
                return value[mask.reshape(-1)]
        return value.reshape(-1, value.shape[-1])


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _add_grams(
    model: nn.Module,
    batch: Batch,
    sums: Sums,
    gradients: bool,
    loss: LossFunction,
    masks: MaskFunction,
    only: Collection[str] | None,
) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = linear_modules(model)
    chosen = {name: m for name, m in modules.items() if only is None or f"{name}.weight" in only}
    hooks = _GramHooks(chosen, sums, gradients, masks(batch))
    try:
        with torch.set_grad_enabled(gradients):
            if gradients:
                loss(model, batch).backward()
            else:
                model(**{key: value for key, value in batch.items() if key != "labels" or _needs_labels(model)})
    finally:
        hooks.remove()


def _draw_probes(
    model: nn.Module, batch: Batch, sums: Sums, masks: MaskFunction, only: Collection[str] | None, sketch: Sketch
) -> None:
    """Run one batch to see which modules read the same input, and draw the probes of each input."""
    trial = Sums()
    _add_grams(model, batch, trial, False, lambda model, batch: torch.zeros(()), masks, only)
    modules = linear_modules(model)
    transposed = set(transposed_modules(model))
    for leader in (name for name in trial.tokens if name not in trial.aliases):
        members = [leader, *(name for name, other in trial.aliases.items() if other == leader)]
        out, inner = modules[leader].get_parameter("weight").shape
        sums.probes[leader] = sketch.probes(members, out if leader in transposed else inner)


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
        example = {
            key: value[index : index + 1] if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        value = loss(model, example)
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            flat = torch.zeros_like(parameter) if gradient is None else gradient
            if "fisher" in kinds:
                sums.add(f"{name}.fisher", flat.square().to(torch.float32))
            if "block_fisher" in kinds and flat.numel() == max(flat.shape) <= MAX_FEATURES:
                sums.add_rows(f"{name}.block_fisher", flat.reshape(1, -1))
