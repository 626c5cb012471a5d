"""Forward proxy: what each neuron can do to the logits, by its weights alone (DART section 3.1, an option).

`G = W_down^T U^T`, with U the unembedding: row i is what one unit of neuron i adds to every logit.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dartprune.cache import cache_folder

BLOCK = 1 << 24  # entries of G that are held at one time


def forward_proxy_flops(neurons: int, hidden: int, vocabulary: int) -> float:
    """Floating point operations of one layer's proxy."""
    return 2.0 * neurons * hidden * vocabulary


def forward_proxy(down: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and mean absolute entry of each row of G, worked out in blocks.

    Args:
        down: [I, H], row i the down projection's column of neuron i.
        unembedding: [V, H].

    Returns:
        `max_v |G[i, v]|` and `mean_v |G[i, v]|`, float32 [I] each, on down's device.
    """
    neurons, vocabulary = down.shape[0], unembedding.shape[0]
    step = max(1, BLOCK // neurons)
    highest = torch.zeros(neurons, device=down.device)
    total = torch.zeros(neurons, device=down.device, dtype=torch.float64)
    rows = down.detach().float()
    for first in range(0, vocabulary, step):
        block = (rows @ unembedding[first : first + step].detach().to(down.device).float().t()).abs()
        highest = torch.maximum(highest, block.amax(1))
        total += block.sum(1, dtype=torch.float64)
    return highest, (total / vocabulary).float()


def cached_forward_proxy(down: Tensor, unembedding: Tensor, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """The same as `forward_proxy`, kept on disk under a hash of the weights; a broken file is made anew."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    path = (folder or cache_folder()) / f"proxy-{_digest(down, unembedding)}.safetensors"
    if path.exists():
        try:
            kept = load_file(path)
            return kept["max"].to(down.device), kept["mean"].to(down.device)
        except (SafetensorError, KeyError, OSError) as error:
            warnings.warn(f"{path} cannot be read ({error}): it is worked out again", stacklevel=2)
    highest, mean = forward_proxy(down, unembedding)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all: another process may read the file now, or this one may be stopped
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        part.write_bytes(save({"max": highest.cpu(), "mean": mean.cpu()}))
        part.replace(path)
    except OSError as error:
        warnings.warn(f"the forward proxy cannot be kept in {path.parent}: {error}", stacklevel=2)
    return highest, mean


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        for rows in tensor.detach().split(max(1, BLOCK // tensor.shape[1])):
            digest.update(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
