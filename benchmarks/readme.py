"""The README's tables of speed and memory, from the results of `dartprune bench`.

    python benchmarks/readme.py benchmarks/results

Reads cpu-kernel.json, cpu-decode.json, cpu-refresh.json, cpu-trace.json and cpu-memory.json, those that are there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def kernel(data: dict[str, Any]) -> Iterator[str]:
    """One line for each dtype and batch: times as fast as dense at each sparsity, and the bandwidth used at 70 %."""
    rows = [row for row in data["rows"] if row["arm"] == "zero-copy"]
    rivals = {row["case"]: row for row in data["rows"] if row["arm"] == "packed copy"}
    levels = sorted({row["extra"]["sparsity"] for row in rows})
    yield (
        "| one FFN, rows read in place | "
        + " | ".join(f"{s:.0%}" for s in levels)
        + " | packed copy at 70 % | bandwidth used |"
    )
    yield "|" + "---|" * (len(levels) + 3)
    for dtype, batch in dict.fromkeys((row["extra"]["dtype"], row["extra"]["batch"]) for row in rows):
        mine = {
            row["extra"]["sparsity"]: row
            for row in rows
            if (row["extra"]["dtype"], row["extra"]["batch"]) == (dtype, batch)
        }
        at = mine.get(0.7)
        packed = f"{rivals[at['case']]['times_as_fast']['median']:.1f}" if at else ""
        used = f"{at['bandwidth_share']:.0%}" if at else ""
        ratios = [f"{mine[s]['times_as_fast']['median']:.1f}" if s in mine else "" for s in levels]
        who = "one sequence" if batch == 1 else f"{batch} sequences, {batch} masks"
        yield f"| {dtype}, {who} | {' | '.join(ratios)} | {packed} | {used} |"


def decode(data: dict[str, Any]) -> Iterator[str]:
    """One line for each arm."""
    yield "| whole decode step | tokens/s | times as fast | realised sparsity | limit (Amdahl) | reached | bandwidth |"
    yield "|" + "---|" * 7
    for row in data["rows"]:
        extra, pruned = row["extra"], row["limit"] is not None
        cells = [
            f"{row['case']}: {row['arm']}",
            f"{extra['tokens_per_second']:.1f}",
            f"{row['times_as_fast']['median']:.2f}",
        ]
        cells += [f"{extra['realised_sparsity']:.2f}", f"{row['limit']:.2f}"] if pruned else ["0", ""]
        cells += [f"{row['share_of_limit']:.0%}" if pruned else "", f"{row['bandwidth_share']:.0%}"]
        yield "| " + " | ".join(cells) + " |"


def refresh(data: dict[str, Any]) -> Iterator[str]:
    """Replay, attaching and detaching in dense decode steps."""
    yield "| what | ms | dense decode steps |"
    yield "|---|---|---|"
    for row in data["rows"]:
        yield f"| {row['arm']} | {1e3 * row['seconds']['median']:.1f} | {row['extra']['dense_steps']:.2f} |"


def trace(data: dict[str, Any]) -> Iterator[str]:
    """Overhead of reading a prompt."""
    yield "| reading a prompt | ms | overhead |"
    yield "|---|---|---|"
    for row in data["rows"]:
        name, seconds = f"{row['case']}, {row['arm']}", row["seconds"]["median"]
        yield f"| {name} | {1e3 * seconds:.0f} | {row['extra']['overhead']:+.1%} |"


def memory(data: dict[str, Any]) -> Iterator[str]:
    """Bytes a sequence."""
    yield "| MB a sequence | measured | reported | all layers, measured | all layers, reported |"
    yield "|---|---|---|---|---|"
    for row in data["rows"]:
        values = (row["added"]["median"], row["reported"], row["all_layers_measured"], row["all_layers_reported"])
        yield f"| {row['case']}: {row['arm']} | " + " | ".join(f"{value / 1e6:.2f}" for value in values) + " |"


def main(folder: Path) -> None:
    """Print all tables as Markdown, each with the command that gave it."""
    for show in (kernel, decode, refresh, trace, memory):
        path = folder / f"cpu-{show.__name__}.json"
        if path.is_file():
            data = json.loads(path.read_text())
            print(*show(data), f"\n`{data['command']}` ({data['machine']['processor']}, {data['date']})\n", sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
