"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from dartprune.bench.result import MemoryRow, Result, Row
from dartprune.bench.timing import Spread
from dartprune.reporting.tables import grid

Column = tuple[str, Callable[[Row], str]]


def _milliseconds(spread: Spread) -> str:
    return f"{1e3 * spread.median:.3f} ({1e3 * spread.lower:.3f} to {1e3 * spread.upper:.3f})"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lower:.2f} to {spread.upper:.2f})"


def _digits(row: Row) -> int:
    return 3 if (row.bytes_moved or 0) < 1e6 else 1


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _extra(name: str, form: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.extra.get(name)
        return "" if value is None else format(value, form)

    return show


def _parts(row: Row) -> str:
    parts: dict[str, float] = row.extra.get("parts", {})
    return ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts.items())


_TIME: list[Column] = [("ms (quartiles)", lambda row: _milliseconds(row.seconds))]
_FAST: list[Column] = [("times as fast as dense", lambda row: _ratio(row.times_as_fast))]
_BYTES: list[Column] = [
    ("MB to read", lambda row: "" if row.bytes_moved is None else f"{row.bytes_moved / 1e6:,.{_digits(row)}f}"),
    ("of the bandwidth", lambda row: _share(row.bandwidth_share)),
]
_LIMIT: list[Column] = [
    ("limit", lambda row: "" if row.limit is None else f"{row.limit:.2f}"),
    ("of the limit", lambda row: _share(row.share_of_limit)),
]
COLUMNS: dict[str, list[Column]] = {
    "kernel": [*_TIME, *_FAST, *_BYTES, *_LIMIT],
    "decode": [
        ("tokens/s", _extra("tokens_per_second", ".1f")),
        *_TIME,
        *_FAST,
        ("realised sparsity", _extra("realised_sparsity", ".3f")),
        *_LIMIT,
        *_BYTES,
        ("pays after", _extra("pays_after_tokens", "d")),
    ],
    "refresh": [*_TIME, ("dense steps", _extra("dense_steps", ".2f")), *_BYTES, ("of it, ms", _parts)],
    "trace": [
        *_TIME,
        ("overhead", _extra("overhead", "+.1%")),
        ("of tracing", _extra("overhead_of_tracing", "+.1%")),
        ("as reported", _extra("overhead_of_tracing_as_reported", "+.1%")),
    ],
}


def tables(result: Result) -> list[Table]:
    """One table for each case, its arms as rows."""
    rows = [row for row in result.rows if isinstance(row, Row)]
    if not rows:
        return [_memory([row for row in result.rows if isinstance(row, MemoryRow)])]
    columns = COLUMNS[result.what]
    heads = ["", *(head for head, _ in columns)]
    return [
        grid(heads, [(row.arm, *(show(row) for _, show in columns)) for row in rows if row.case == case], title=case)
        for case in dict.fromkeys(row.case for row in rows)
    ]


def _memory(rows: Sequence[MemoryRow]) -> Table:
    columns = ["unattached", "attached", "attaching adds", "reported", "all layers, measured", "all layers, reported"]
    cells = []
    for row in rows:
        spreads = [f"{s.median / 1e6:.3f} ({s.lower / 1e6:.3f} to {s.upper / 1e6:.3f})" for s in
                   (row.unattached, row.attached, row.added)]  # fmt: skip
        whole = (row.reported, row.all_layers_measured, row.all_layers_reported)
        cells.append((row.arm, *spreads, *(f"{value / 1e6:.3f}" for value in whole)))
    return grid(["", *columns], cells, title=f"{rows[0].case}: MB a sequence")


def remarks(result: Result) -> list[str]:
    """What must be known to read the tables, a line each."""
    lines = []
    if result.bandwidth is not None:
        b = result.bandwidth
        lines.append(
            f"{result.device} streams {b.median / 1e9:.1f} GB/s ({b.lower / 1e9:.1f} to {b.upper / 1e9:.1f}): "
            "torch's sum over a buffer far larger than the caches"
        )
    first = result.rows[0]
    if result.what == "decode" and isinstance(first, Row):
        share, by_bytes = first.extra["ffn_share_of_dense_step"], first.extra["ffn_share_of_step_bytes"]
        lines.append(
            f"the FFN takes {share:.1%} of a dense step's time and {by_bytes:.1%} of its weight bytes; "
            "the limit is Amdahl's for the time, at the realised sparsity"
        )
    if result.what == "kernel":
        lines.append("the limit is reading the arm's bytes at full bandwidth, against the dense arm as measured")
    return [*lines, *(f"note: {note}" for note in result.notes)]
