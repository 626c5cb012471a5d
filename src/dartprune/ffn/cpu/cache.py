"""Compiled kernels on disk, kept until any file that they may be made of changes.

Numba looks at a cached function's own file alone, while a kernel is put together from several.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile


def digest(folder: Path) -> str:
    """Names one state of all Python files of a folder; ValueError where it holds none."""
    total = hashlib.sha256()
    files = sorted(folder.glob("*.py"))
    if not files:
        raise ValueError(f"no Python files in {folder}: stale kernels could not be told from fresh ones")
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


@cache
def _sources() -> str:
    return digest(Path(__file__).parent)


class _Kept(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, which is fresh as long as every source is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, _sources())


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for what Python calls: `numba.njit` without the interpreter's lock, kept on disk."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, **options)(function)
        dispatcher._cache = _Kept(function)
        return dispatcher

    return compiled
