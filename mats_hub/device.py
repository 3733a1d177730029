"""Where to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mats_hub.errors import RecipeError, ResourceError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device a name stands for; ``auto`` takes a CUDA device, else Apple's, else the CPU.

    Raises:
        RecipeError: the device is not on this machine.

    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name.split(":")[0], False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise RecipeError(f"device {name!r} is not on this machine; it has: {usable}")
    return torch.device(name)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device in a dtype; to CUDA it is copied as it is stored, which is the narrower, and cast there."""
    return tensor.to(device, non_blocking=True).to(dtype) if device.type == "cuda" else tensor.to(device, dtype)


@contextmanager
def memory_errors(when: str, way_out: str) -> Iterator[None]:
    """Turn what torch and Python say when memory runs out into a `ResourceError` with its way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ResourceError(f"memory ran out while {when}. {way_out}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread on the CPU: what is small is done before several threads have found together."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
