"""Functions for Numba that only look at arrays: without counting who else holds them.

To slice an array costs two counts that are shared between threads, in a loop over rows more than the arithmetic. Who
calls such a function holds what it is given until it returns. It may neither make an array nor return one; the compiler
refuses the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def lean(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `numba.njit` without the interpreter's lock and without counts of references."""
    decorated: Callable[[Callable[..., Any]], Any] = njit(nogil=True, _nrt=False, **options)
    return decorated
