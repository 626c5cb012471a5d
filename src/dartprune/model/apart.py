"""Our own arithmetic, kept apart from what the caller has switched on around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def apart() -> Iterator[None]:
    """No graph of gradients, no inference tensors and no autocast inside, whatever the caller is in.

    What a run makes lives longer than the caller's block: statistics must not keep a graph alive, weights that are laid
    out anew must be ordinary tensors again, and sums must keep their dtype.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
