"""Small values from the host as tensors on a device, copied once: a copy would make every token wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

REMEMBERED = 64  # tensors


class DeviceValues:
    """Remembers the tensors it made."""

    def __init__(self) -> None:
        self._tensors: dict[Any, Tensor] = {}

    def __call__(self, values: Sequence[int] | Sequence[bool], device: torch.device) -> Tensor:
        """These values, int64 or bool [n], on a device; never to be written to."""
        key = (device, *map(type, values[:1]), *values)
        if key not in self._tensors:
            if len(self._tensors) >= REMEMBERED:
                self._tensors.clear()
            self._tensors[key] = torch.tensor(values, device=device)
        return self._tensors[key]
