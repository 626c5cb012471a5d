"""The tables of docs/measurements.md, from the results of `dartprune bench` and `dartprune compare`.

    python benchmarks/tables.py benchmarks/results

Reads compare-*.csv, and of the JSON files those whose benchmark is known here.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STREAMS = 30  # of each kind in the committed comparisons


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


def kernels_of(data: dict[str, Any]) -> Iterator[str]:
    """One line for each way of one FFN, everything counted."""
    yield f"| {data['rows'][0]['case']} | ms | times as fast | bandwidth |"
    yield "|---|---|---|---|"
    for row in data["rows"]:
        share = "" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}"
        fast = row["times_as_fast"]["median"]
        yield f"| {row['arm']} | {1e3 * row['seconds']['median']:.2f} | {fast:.1f} | {share} |"


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
        dense = "0" if row["arm"] == "dense" else ""
        cells += [f"{extra['realised_sparsity']:.2f}", f"{row['limit']:.2f}"] if pruned else [dense, ""]
        cells += [f"{row[name]:.0%}" if row[name] is not None else "" for name in ("share_of_limit", "bandwidth_share")]
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


def compare(rows: Sequence[dict[str, str]], target: float) -> Iterator[str]:
    """One line for each arm at one target: loss over dense with its interval on each part, refreshes, bytes."""
    yield "| arm | realised | one topic | before the change | after it | refreshes / 200 tokens | FFN bytes saved |"
    yield "|---|---|---|---|---|---|---|"
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if float(row["target"]) == target:
            found.setdefault(row["arm"], {})[row["part"]] = row
    for arm, parts in sorted(found.items(), key=lambda item: -float(item[1]["after"]["loss_over_dense"])):
        after, steady = parts["after"], parts["one topic"]
        mark = "†" if after["ceiling"] == "True" else "" if after["reached"] == "True" else "*"
        tokens = (int(steady["dense_tokens"]) + int(steady["pruned_tokens"])) / STREAMS
        often = 200 * float(steady["refreshes_per_stream"]) / tokens
        cells = [f"`{arm}`{mark}", f"{float(after['realised_sparsity']):.2f}"]
        cells += [_interval(parts[part]) for part in ("one topic", "before", "after")]
        yield "| " + " | ".join([*cells, f"{often:.1f}", f"{float(after['bytes_saved']):.2f}"]) + " |"


def levels(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """One line for each arm: loss over dense on one topic / after a change, at every target."""
    targets = sorted({float(row["target"]) for row in rows} - {0.0})
    yield "| one topic / after the change | " + " | ".join(f"{target:.0%}" for target in targets) + " |"
    yield "|" + "---|" * (len(targets) + 1)
    found: dict[str, dict[tuple[float, str], dict[str, str]]] = {}
    for row in rows:
        if row["target"] != "0.0":
            found.setdefault(row["arm"], {})[float(row["target"]), row["part"]] = row
    last = targets[-1], "after"
    for arm, parts in sorted(found.items(), key=lambda item: -float(item[1][last]["loss_over_dense"])):
        cells = []
        for target in targets:
            both = [parts[target, part] for part in ("one topic", "after")]
            mark = "" if all(row["reached"] == "True" for row in both) else "*"
            cells.append(" / ".join(f"{float(row['loss_over_dense']):.2f}" for row in both) + mark)
        yield f"| `{arm}` | " + " | ".join(cells) + " |"


def _interval(row: dict[str, str]) -> str:
    mean, low, high = (float(row[f"loss_over_dense{end}"]) for end in ("", "_low", "_high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def main(folder: Path) -> None:
    """Print all tables as Markdown, each with the command that gave it."""
    for path in sorted(folder.glob("compare-*.csv")):
        rows = list(csv.DictReader(path.open()))
        print(f"{path.stem}\n", *levels(rows), "", sep="\n")
        for target in sorted({float(row["target"]) for row in rows} - {0.0}):
            print(f"{path.stem}, {target:.0%}\n", *compare(rows, target), "", sep="\n")
    ways = {"kernel": kernel, "token kernels": kernels_of, "decode": decode}
    ways |= {"refresh": refresh, "trace": trace, "memory": memory}
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for what, show in ways.items():
        for data in files:
            if data.get("benchmark") == what:
                machine = data["machine"].get("accelerator", data["machine"]["processor"])
                print(*show(data), f"\n`{data['command']}` ({machine}, {data['date']})\n", sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
