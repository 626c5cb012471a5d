"""How many threads the kernels use: as many as torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_threads(most: int | None = None) -> int:
    """Let Numba use as many threads as torch does, or `most`; gives their number. Torch's stays what it is."""
    import numba

    given = torch.get_num_threads()
    threads = min(given, most or given)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != given:  # Numba's threads were started, on an OpenMP runtime that torch shares
        torch.set_num_threads(given)
    return threads


@contextmanager
def kept_threads() -> Iterator[None]:
    """Leave torch its number of threads: both may sit on one OpenMP runtime, where Numba's start sets it anew."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
