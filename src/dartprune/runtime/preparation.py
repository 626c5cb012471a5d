"""Kernels that must be compiled before the first token: told when it takes long, and no cost of attaching."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LONG = 1.0  # seconds: kernels that were compiled before are read from disk in less
_log = logging.getLogger("dartprune")


class Preparation:
    """Seconds spent on kernels of one attach; one line is logged when it takes long."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._told = False

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Inside, kernels for `what` are made ready."""
        timer = threading.Timer(LONG, self._tell, [what])
        timer.daemon = True
        began = time.perf_counter()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.seconds += time.perf_counter() - began

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            _log.warning("compiling kernels for %s, once: this may take half a minute", what)
