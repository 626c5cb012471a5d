"""What each layer keeps, written by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.errors import UserError


def entries(table: str) -> list[tuple[str, int, int | None, str]]:
    """Each entry's text, first and last layer (None: to the end) and amount; what needs no model is checked."""
    out: list[tuple[str, int, int | None, str]] = []
    for entry in (part.strip() for part in table.split(",")):
        match = re.fullmatch(r"(all|(\d+)(?:-(\d+))?)\s*:\s*(\d+\.\d*|\.\d+|\d+)", entry)
        if match is None:
            raise UserError(f"budget entry {entry!r} cannot be read: write layer:share, first-last:share or all:share")
        where, first, last, amount = match.groups()
        if where == "all":
            out.append((entry, 0, None, amount))
            continue
        begin, end = int(first), int(last or first)
        if begin > end:
            raise UserError(f"budget entry {entry!r} names the range backwards: write {end}-{begin}")
        out.append((entry, begin, end, amount))
    return out


def parse_table(table: str, neurons: Sequence[int]) -> Tensor:
    """Pruned fractions from a table of what each layer keeps.

    Args:
        table: entries such as `0:0.9,1-3:0.82,4:1200,all:0.3`: a layer, a range or `all`, then the share of neurons to
            keep (with a point) or their number. Later entries win over earlier ones.
        neurons: neurons of each layer.

    Returns:
        float32 [L].

    Raises:
        ValueError: an entry that cannot be read or does not fit the model, or a layer that no entry names.
    """
    layers = len(neurons)
    out = [math.nan] * layers
    for entry, begin, last, amount in entries(table):
        end = layers - 1 if last is None else last
        if end >= layers:
            raise UserError(f"budget entry {entry!r} names layer {end}, but the model has layers 0 to {layers - 1}")
        for layer in range(begin, end + 1):
            keep = float(amount) if "." in amount else int(amount) / neurons[layer]
            if keep > 1:
                raise UserError(f"budget entry {entry!r} keeps more than the {neurons[layer]} neurons of layer {layer}")
            out[layer] = 1 - keep
    missing = [layer for layer, value in enumerate(out) if math.isnan(value)]
    if missing:
        raise UserError(f"the budget table names no share for layer {missing[0]}: add it, or 'all:SHARE' in front")
    return torch.tensor(out, dtype=torch.float32, device="cpu")
