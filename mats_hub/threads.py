"""Several threads with one piece of work each, and torch on one thread inside of each.

Threads of torch's own inside one small operation wait for each other most of the time, and collapse where the machine has
anything else to do; pieces of work that do not depend on each other do not.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

KEPT_BYTES = 31 * 2**20

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8
"""Threads: with more the interpreter's own lock is what they wait for."""

PIPELINE = 3
"""Threads beside a CUDA device: while it computes with one's piece, another reads and copies, and a third writes."""


def workers(device: torch.device) -> int:
    """Return how many threads to use: on a CPU as many as torch would (``OMP_NUM_THREADS``), a few beside a CUDA device."""
    return {"cpu": min(MOST, torch.get_num_threads()), "cuda": PIPELINE}.get(device.type, 1)


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed for what is allocated next, instead of giving it back at once.

    glibc gives back freed blocks of more than a threshold, which it learns from the largest one that was freed (32 MiB at
    most, see mallopt(3)). Pieces of a few MB are allocated and freed over and over, and clearing their pages anew takes
    longer than all that is computed with them. Where another C library is used this does nothing.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


def give_back_freed_memory() -> None:
    """Let the C library give back what it kept; see `keep_freed_memory`."""
    with suppress(AttributeError, OSError, TypeError):  # not of all C libraries
        ctypes.CDLL(None).malloc_trim(0)


def in_threads(do: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """Yield what `do` returns of each item, in their order, working on `count` of them at a time and a few ahead.

    An item's result does not depend on `count`, but for what torch itself makes of its number of threads.
    """
    if count == 1:
        yield from map(do, items)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that begin now take it over
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(count)
    try:
        for item in items:
            ahead.append(pool.submit(do, item))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
