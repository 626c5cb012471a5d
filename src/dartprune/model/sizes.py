"""How many weights a model has, how many bytes they take, and what they are kept in; packed ones too."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

from dartprune.model.layer import held
from dartprune.model.packed import Packed
from dartprune.model.packed_rows import RowProjection

DIGESTED = 1 << 18  # values of each weight that tell one checkpoint from another


def count(module: nn.Module) -> tuple[int, int]:
    """The weights of a module and all in it, and their bytes; what is shared counts once, packed weights one by one."""
    sizes = {id(tensor): tensor.numel() for tensor in module.parameters()}
    tensors = {id(tensor): tensor.nbytes for tensor in module.parameters()}
    packed = {}
    for part in module.modules():
        if isinstance(part, Packed):
            own = {tensor.data_ptr(): tensor.nbytes for tensor in part.buffers(recurse=False)}
            packed[next(iter(own)), part.role] = part.weights
            tensors |= own
    return sum(sizes.values()) + sum(packed.values()), sum(tensors.values())


def dtype_name(model: nn.Module) -> str:
    """What a model's weights are kept in: `int4` or `int8` where its FFN is in rows, else the dtype of the first."""
    for part in model.modules():
        if isinstance(part, RowProjection) and not part.is_alone:
            return f"int{part.layout.bits}"
    first = next((tensor for tensor in held(model) if tensor.is_floating_point()), torch.empty(0, device="cpu"))
    return str(first.dtype).removeprefix("torch.")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one checkpoint from another: class, weights, dtype, and a digest of part of each weight."""
    digest = 0
    packed = (part for part in model.modules() if isinstance(part, Packed))
    for tensor in (*model.parameters(), *(tensor for part in packed for tensor in part.buffers(recurse=False))):
        if tensor.device.type != "meta":
            part = tensor.detach().flatten()[:DIGESTED].cpu().contiguous()
            digest = zlib.crc32(part.view(torch.uint8).numpy().tobytes(), digest)
    return {
        "class": type(model).__name__,
        "parameters": count(model)[0],
        "dtype": dtype_name(model),
        "digest": f"{digest:08x}",
    }
