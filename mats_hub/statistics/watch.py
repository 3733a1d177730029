"""Watching a model compute: what each parameter multiplies, and the gradient that comes back, whatever the architecture.

A parameter is told by what is done with it, never by its name. Modules that are their own kind (linear, convolution, norm) are
hooked; looking up an embedding and multiplying by a bare parameter (a router's, or one matrix of a stack of experts) is
noticed where it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mats_hub.architecture import stacked_parameters
from mats_hub.errors import StatisticsError
from mats_hub.statistics.accumulate import Sums

MAX_FEATURES = 16384
"""No Gram is wider than this: a vocabulary's output Gram alone would take gigabytes."""

AS_OUTPUT = ".as_output"
"""Ending of the module whose sums are of an embedding's weight where it is the head, too."""

PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)
"""Functions that multiply rows by a matrix, their first two arguments."""


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that multiply by a weight of their own: Linear and Conv1D, without heads tied to an embedding."""
    from transformers.pytorch_utils import Conv1D

    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in seen and _is_product(module):
            found[name] = module
            seen.add(id(module.weight))
    return found


@torch.no_grad()
def _is_product(module: nn.Module) -> bool:
    """Tell whether what a linear module puts out is rows of its width: some models' own multiply by blocks, or choose experts."""
    if type(module).__module__.startswith(("torch.", "transformers.pytorch_utils")) or not isinstance(
        module, nn.Linear
    ):
        return True
    weight = module.weight
    if not weight.is_floating_point() or weight.is_meta or weight.shape != (module.out_features, module.in_features):
        return True  # stored in its quantizer's own way
    try:
        found = module(weight.new_ones(1, 1, module.in_features))
    except (RuntimeError, ValueError, IndexError):
        return False
    return isinstance(found, Tensor) and found.shape == (1, 1, module.out_features)


def transposed_modules(model: nn.Module) -> list[str]:
    """Return the modules that store their weight ``[in, out]``."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in linear_modules(model).items() if isinstance(module, Conv1D)]


class Watch(TorchFunctionMode):
    """Adds what is seen of one forward (and backward) pass to `sums`, as a context manager around it.

    Args:
        model: the model.
        sums: what to add to; with `trial` its tokens alone.
        gradients: whether a backward pass follows, so that sums over output gradients are wanted as well.
        masks: ``[batch, length]`` of the tokens that count; inputs of another shape count whole.
        batch_size: examples in the pass.
        only: names of the parameters to watch; all when None.
        trial: whether this pass only counts tokens and finds out which modules share an input, adding no sums.

    Attributes:
        widths: module that has an input Gram → its number of features.
        out_widths: module that has an output Gram, if gradients are taken → its number of features.
        led_by: module → the modules that read the same input before it.

    """

    def __init__(
        self,
        model: nn.Module,
        sums: Sums,
        gradients: bool,
        masks: Sequence[Tensor],
        batch_size: int,
        only: Collection[str] | None = None,
        trial: bool = False,
    ) -> None:
        super().__init__()
        self._model, self._sums, self._gradients, self._masks = model, sums, gradients, masks
        self._batch_size, self._only, self._trial = batch_size, only, trial
        self._names = {id(p): name for name, p in model.named_parameters()}
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._embeddings = {name for name, p in model.named_parameters() if id(p) in embeddings}
        self._bare: dict[int, tuple[str, nn.Parameter]] = {}
        self._last: tuple[Tensor | None, str] = (None, "")
        self._handles: list[Any] = []
        self._inside = False
        self.widths: dict[str, int] = {}
        self.out_widths: dict[str, int] = {}
        self.led_by: dict[str, set[str]] = {}

    def __enter__(self) -> Watch:
        self._stacked = stacked_parameters(self._model)
        hooked: set[int] = set()
        linear = linear_modules(self._model)
        for name, module in self._model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            weight = own.get("weight")
            if weight is None:
                continue
            if name in linear:
                self._hook_product(name, module, own, "linear", lambda module, x: self._unmasked(x), self._unmasked)
            elif isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
                self._hook_product(name, module, own, "convolution", _unfolded, _channels_last)
            elif weight.dim() == 1 and not any(module.children()):
                self._hook(name, module, own, self._on_scale(name, module))
            else:
                continue
            hooked |= {id(p) for p in own.values()}
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in hooked and parameter.dim() in (2, 3) and self._wanted(name):
                self._bare[parameter.data_ptr()] = (name, parameter)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        # Else the input and the hooks on the graph behind it would keep each other, and what they hold, for ever.
        self._last = (None, "")

    # Modules that are their own kind

    def _hook_product(
        self,
        name: str,
        module: nn.Module,
        own: dict[str, nn.Parameter],
        kind: str,
        rows_of: Callable[[nn.Module, Tensor], Tensor],
        gradients_of: Callable[[Tensor], Tensor],
    ) -> None:
        names = {leaf: self._names[id(p)] for leaf, p in own.items()}
        wide = max(own["weight"].shape) > MAX_FEATURES

        def on_input(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = inputs[0] if inputs else next(iter(named.values()))
            rows = rows_of(module, x)
            if rows.shape[-1] > MAX_FEATURES:
                return None
            self._sums.tokens[name] = self._sums.tokens.get(name, 0) + len(rows)
            self._use(names["weight"], kind, name)
            if "bias" in names:
                self._use(names["bias"], "bias", name)
            leader = self._leader(x, name) if kind == "linear" else name
            self._add_input(name, leader, rows)
            if self._gradients and not x.requires_grad:
                return (x.detach().requires_grad_(), *inputs[1:]), {} if not inputs else named
            return None

        def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if self._trial:
                self.out_widths[name] = gradients_of(output).shape[-1]
            elif output.requires_grad:  # some models choose without gradients what to attend to
                output.register_hook(lambda g: self._sums.add_outputs(name, gradients_of(g)))

        if not self._wanted(*names.values()):
            if kind == "linear":
                self._handles.append(module.register_forward_pre_hook(self._pass_by, with_kwargs=True))
        else:
            self._handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
            if (self._gradients or self._trial) and not wide:
                self._handles.append(module.register_forward_hook(on_output))

    def _leader(self, x: Tensor, name: str) -> str:
        """Return the first watched module that read this input, the last distinct one; it is `name` itself if none did."""
        # That input is kept alive, so its address cannot be taken by another tensor meanwhile.
        last, leader = self._last
        if last is None or not _same_tensor(last, x) or not leader:
            self._last = (x, name)
            return name
        return leader

    def _pass_by(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Notice what a module reads that is not watched, so that who shares an input does not depend on who is watched."""
        self._leader(inputs[0] if inputs else next(iter(named.values())), "")

    def _hook(self, name: str, module: nn.Module, own: dict[str, nn.Parameter], hook: Any) -> None:
        if self._wanted(*(self._names[id(p)] for p in own.values())):
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _on_scale(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Return a hook on a module whose output is linear in a vector that scales features: a norm of any kind."""
        own = {leaf: p.detach() for leaf, p in module.named_parameters(recurse=False)}
        zeros = {leaf: torch.zeros_like(value) for leaf, value in own.items()}
        features_last = not isinstance(module, _BatchNorm | nn.GroupNorm)

        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            if self._inside or not isinstance(output, Tensor):
                return None
            self._inside = True
            try:
                with torch.no_grad():
                    at = [
                        torch.func.functional_call(module, values, inputs, named)
                        for values in (zeros, {**zeros, "weight": torch.ones_like(own["weight"])})
                    ]
            finally:
                self._inside = False
            scaled = at[1] - at[0]
            rows_of = self._rows_of(name, scaled) if features_last else _channels_last
            if scaled.shape[-1 if features_last else 1] != own["weight"].numel():
                return None
            rows = rows_of(scaled).float()
            sums = self._sums
            sums.tokens[name] = sums.tokens.get(name, 0) + len(rows)
            for leaf in own:
                self._use(f"{name}.{leaf}", "norm" if leaf == "weight" else "bias", name)
            if self._trial:
                return None
            sums.add(f"{name}.weight.input_squares", rows.square().sum(0))
            if not self._gradients or not torch.is_grad_enabled():
                return None

            def on_gradient(g: Tensor) -> None:
                found = rows_of(g).float()
                sums.add(f"{name}.weight.gradient_squares", (found * rows).square().sum(0))
                if "bias" in own:
                    sums.add(f"{name}.bias.gradient_squares", found.square().sum(0))

            output = output if output.requires_grad else output.detach().requires_grad_().clone()
            output.register_hook(on_gradient)
            return output

        return hook

    def _rows_of(self, name: str, value: Tensor) -> Callable[[Tensor], Tensor]:
        """Return how to get the rows of real tokens from values like this one: heads may stand before or after tokens."""
        if value.dim() != 4 or not self._masks:
            return self._unmasked
        axes = [axis for axis in (1, 2) for m in self._masks if (value.shape[0], value.shape[axis]) == m.shape]
        if len(set(axes)) == 1:  # where there are as many heads as tokens, what was seen before tells
            self._sums.token_axis.setdefault(name, axes[0])
        swapped = self._sums.token_axis.get(name) == 2
        return lambda found: self._unmasked(found.transpose(1, 2) if swapped else found)

    # Bare parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notice a look-up of an embedding and a product with a bare parameter."""
        result = func(*args, **(kwargs or {}))
        if self._inside or len(args) < 2:
            return result
        if func is nn.functional.embedding:
            return self._on_look_up(args[0], args[1], result)
        if func in PRODUCTS and isinstance(args[1], Tensor):
            weight = args[1] if func is nn.functional.linear else args[1].mT if args[1].dim() > 1 else args[1]
            return self._on_product(args[0], weight, result)
        return result

    def _on_look_up(self, ids: Tensor, weight: Tensor, result: Tensor) -> Tensor:
        name, parameter = self._bare.get(weight.data_ptr(), ("", weight))
        if not name or parameter.shape != weight.shape:
            return result
        module = name.removesuffix(".weight")
        if self._trial and self._batch_size == 1:
            # Several rows of one example stand for something else than its tokens, unless they are masked as such.
            single = ids.dim() < 2 or ids.shape[0] == 1 or any(ids.shape == mask.shape for mask in self._masks)
            self._sums.per_token[module] = single and self._sums.per_token.get(module, True)
        if self._sums.per_token.get(module):
            counted, times = self._times(ids)
            sums = self._sums
            sums.tokens[module] = sums.tokens.get(module, 0) + int(times.sum())
            sums.use(name, "embedding", module)
            if self._trial:
                return result
            counts = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
            sums.add(f"{module}.input_counts", counts.index_add_(0, counted.reshape(-1), times.reshape(-1).float()))
        if self._gradients and not result.requires_grad:
            return result.detach().requires_grad_().clone()
        return result

    def _times(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and how many unmasked tokens of the batch each of them stands for."""
        for mask in self._masks:
            if ids.shape == mask.shape:
                return ids, mask
            if ids.numel() == mask.shape[1] == ids.shape[-1]:  # positions, the same for every example
                return ids, mask.sum(0)
        each = 1 if ids.dim() == 2 and ids.shape[0] == self._batch_size else self._batch_size
        return ids, torch.full_like(ids, each)

    def _on_product(self, x: Any, weight: Tensor, result: Tensor) -> Tensor:
        found = self._matrix(weight)
        if found is None or not isinstance(x, Tensor) or x.shape[-1] > MAX_FEATURES:
            return result
        name, index, count = found
        tied = name in self._embeddings
        module = name.removesuffix(".weight") + (AS_OUTPUT if tied else "")
        rows = self._unmasked(x)
        sums = self._sums
        sums.tokens[module] = sums.tokens.get(module, 0) + len(rows)
        sums.use(name, "linear" if index is None else "experts", module)
        if not self._trial:
            sums.add_rows(f"{module}.input_gram", rows, index, count)
        if self._gradients and torch.is_grad_enabled() and not tied and result.shape[-1] <= MAX_FEATURES:
            result = result if result.requires_grad else result.detach().requires_grad_().clone()
            result.register_hook(lambda g: sums.add_rows(f"{module}.output_gram", self._unmasked(g), index, count))
        return result

    def _matrix(self, weight: Tensor) -> tuple[str, int | None, int] | None:
        """Return the parameter that a matrix ``[out, in]`` is, or which matrix it is of a stack of how many.

        None for any other, and for one that is stored in another way than its architecture says.
        """
        if weight.dim() != 2:
            return None
        if weight.data_ptr() in self._bare:
            name, parameter = self._bare[weight.data_ptr()]
            if parameter.dim() == 2:
                return (
                    (name, None, 0)
                    if (weight.shape, weight.stride()) == (parameter.shape, parameter.stride())
                    else None
                )
        for name, stack in self._bare.values():
            held = weight.T if self._stacked.get(name, (0, False))[1] else weight
            if stack.dim() == 3 and (held.shape, held.stride()) == (stack.shape[1:], stack.stride()[1:]):
                offset, step = weight.data_ptr() - stack.data_ptr(), stack.stride(0) * stack.element_size()
                if 0 <= offset < len(stack) * step and offset % step == 0:
                    return name, offset // step, len(stack)
        return None

    # What is common

    def _wanted(self, *names: str) -> bool:
        return self._only is None or any(name in self._only for name in names)

    def _use(self, parameter: str, kind: str, module: str) -> None:
        if self._wanted(parameter):
            self._sums.use(parameter, kind, module)

    def _add_input(self, name: str, leader: str, rows: Tensor) -> None:
        if self._trial:
            self.widths[name] = rows.shape[-1]
            self.led_by.setdefault(name, set()).add(leader)
            return
        known = self._sums.aliases.get(name)
        if known is None:
            self._sums.add_inputs(name, rows)
        elif known != leader:
            raise StatisticsError(
                f"module {name!r} read the same input as {known!r} at first and another one later; its path through the "
                "model depends on the data, which shared Grams cannot follow"
            )

    def aliases(self) -> dict[str, str]:
        """Return, after a trial, module → the module that it always read the same input with, and nothing else did either."""
        alone = {name: next(iter(leaders)) for name, leaders in self.led_by.items() if len(leaders) == 1}
        tokens = self._sums.tokens
        return {n: leader for n, leader in alone.items() if leader != n and tokens[n] == tokens[leader]}

    def _unmasked(self, value: Tensor) -> Tensor:
        """Return the rows ``[n, features]`` of a module's input or output gradient that belong to real tokens."""
        for mask in self._masks:
            if value.dim() >= 3 and value.shape[:2] == mask.shape:
                return value[mask].reshape(-1, value.shape[-1])
            if value.dim() == 2 and len(value) == mask.numel() and len(value) != len(mask):
                return value[mask.reshape(-1)]
        return value.reshape(-1, value.shape[-1])


def has_experts(model: nn.Module) -> bool:
    """Tell whether some parameter stacks the matrices of several experts, which see tokens without their place."""
    return any(count > 1 for count, _ in stacked_parameters(model).values())


def _unfolded(module: nn.Module, x: Tensor) -> Tensor:
    """Return the patches ``[n, in · kernel]`` that a convolution multiplies by its weight."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    x = nn.functional.pad(x.detach(), module._reversed_padding_repeated_twice)
    settings = [module.kernel_size, module.dilation, module.stride]
    if isinstance(module, nn.Conv1d):
        x, settings = x.unsqueeze(-2), [(1, *setting) for setting in settings]
    kernel, dilation, stride = settings
    patches = nn.functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _channels_last(value: Tensor) -> Tensor:
    return value.flatten(2).transpose(1, 2).reshape(-1, value.shape[1])


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
