"""What a benchmark found, as data: rows, the machine, the command, the versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dartprune.bench.timing import Spread
from dartprune.ffn.timing import processor

_PACKAGES = ("dartprune", "torch", "transformers", "numba", "triton")


@dataclass(frozen=True)
class Row:
    """One arm of one case.

    seconds: of what the benchmark counts (one FFN, one token, one replay, one prompt).  times_as_fast: as the dense
    arm, measured in turn with it.  bytes_moved: weights (and cache) that must be read for it.  bandwidth_share: of the
    streaming bandwidth measured in the same turns.  limit: times as fast as dense that could be reached at best, see
    the benchmark for what it assumes.  extra: further figures by name.
    """

    case: str
    arm: str
    seconds: Spread
    times_as_fast: Spread
    bytes_moved: int | None = None
    bandwidth_share: float | None = None
    limit: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def share_of_limit(self) -> float | None:
        """What was reached of what could be."""
        return None if self.limit is None else self.times_as_fast.median / self.limit


@dataclass(frozen=True)
class MemoryRow:
    """Bytes that one sequence holds while it is decoded, its cache included.

    unattached, attached: measured.  added: their difference.  reported: the run's own count of it.
    all_layers_reported, all_layers_measured: for the whole shape where fewer layers were measured.
    """

    case: str
    arm: str
    unattached: Spread
    attached: Spread
    added: Spread
    reported: int
    all_layers_reported: int
    all_layers_measured: float


@dataclass(frozen=True)
class Result:
    """All rows of one benchmark. bandwidth: bytes per second that the device streams, None where it plays no part."""

    what: str
    device: torch.device
    settings: dict[str, Any]
    rows: Sequence[Row | MemoryRow]
    bandwidth: Spread | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self, command: str | None = None) -> dict[str, Any]:
        """Plain data, ready for JSON, with everything that is needed to run it again."""
        rows = []
        for row in self.rows:
            data = asdict(row)
            if isinstance(row, Row):
                data["share_of_limit"] = row.share_of_limit
            rows.append(data)
        return {
            "benchmark": self.what,
            "date": str(date.today()),
            "machine": machine(self.device),
            "versions": versions(),
            "command": command,
            "settings": self.settings,
            "bandwidth_bytes_per_second": None if self.bandwidth is None else asdict(self.bandwidth),
            "rows": rows,
            "notes": self.notes,
        }

    def write(self, path: Path, command: str | None = None) -> None:
        """Write the data to a file."""
        path.write_text(json.dumps(self.to_dict(command), indent=1) + "\n", encoding="utf-8")


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, its threads in use, and the accelerator if that is what was measured."""
    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the speed, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
