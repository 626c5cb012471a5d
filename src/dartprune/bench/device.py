"""What the device can do: caches, free memory, and the bandwidth at which it streams memory."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from dartprune.bench.timing import Spread, seconds_per_call
from dartprune.errors import UserError

STREAM = 512 * 2**20  # bytes, at least
UNKNOWN_CACHE = 64 * 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CGROUP = Path("/sys/fs/cgroup")


def device_of(name: str | None) -> torch.device:
    """The device of that name, the CPU for None; ValueError if it cannot be used."""
    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} cannot be measured: write cpu or cuda")
    return device


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between a core and the memory; a guess where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=UNKNOWN_CACHE)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [value for value in (_available(), _left_in_cgroup()) if value is not None]
    return min(known, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return int(_psutil().virtual_memory().available) if _has_psutil() else None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_cgroup() -> int | None:
    try:
        most, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return int(most) - int(used) if most.isdigit() else None


def resident_bytes() -> int:
    """Bytes of this process that lie in memory; ValueError where neither /proc nor psutil can tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        if not _has_psutil():
            raise UserError("resident memory cannot be read on this system: pip install psutil") from None
        return int(_psutil().Process().memory_info().rss)
    return pages * os.sysconf("SC_PAGE_SIZE")


def _has_psutil() -> bool:
    return importlib.util.find_spec("psutil") is not None


def _psutil() -> Any:
    return importlib.import_module("psutil")


class BandwidthProbe:
    """A buffer far larger than the caches, and the time in which the device reads it once: the bandwidth limit."""

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        """Allocate `size` bytes (default: enough, and at most a quarter of the free memory)."""
        self.device = device
        if size is None:
            size = max(STREAM, 8 * last_level_cache(device))
            free = free_bytes(device)
            size = size if free is None else min(size, free // 4)
        self._buffer = torch.ones(size // 4, dtype=torch.float32, device=device)

    @property
    def bytes(self) -> int:
        """Bytes that one reading moves."""
        return self._buffer.nbytes

    def seconds(self) -> float:
        """Seconds of one reading, as torch's sum over the buffer."""
        return seconds_per_call(self._buffer.sum, self.device)

    def bandwidth(self, turns: int = 5) -> Spread:
        """Bytes per second."""
        return Spread.of([self.bytes / self.seconds() for _ in range(turns)])
