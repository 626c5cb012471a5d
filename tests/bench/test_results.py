"""Results as JSON, table and picture: everything that is needed to run and to read them is there."""

from __future__ import annotations

import io
import json

import pytest
import torch

from dartprune.bench.picture import draw_memory, draw_rows, save_result
from dartprune.bench.result import MemoryRow, Result, Row
from dartprune.bench.table import remarks, tables
from dartprune.bench.timing import Spread

CPU = torch.device("cpu")


def spread(value):
    return Spread(0.9 * value, value, 1.1 * value)


def result(what="decode", **extra):
    facts = {"tokens_per_second": 10.0, "ffn_share_of_dense_step": 0.6, "ffn_share_of_step_bytes": 0.65, **extra}
    rows = [
        Row("case", "dense", spread(0.1), spread(1.0), 2_000_000, 0.4, None, facts),
        Row("case", "pruned", spread(0.05), spread(2.0), 1_000_000, 0.5, 2.5, facts | {"pays_after_tokens": 12}),
    ]
    return Result(what, CPU, {"turns": 3}, rows, spread(4e10), ["a remark"])


def test_json(tmp_path):
    result().write(tmp_path / "out.json", "dartprune bench decode")
    data = json.loads((tmp_path / "out.json").read_text())
    assert {"benchmark", "date", "machine", "versions", "command", "settings", "bandwidth_bytes_per_second", "rows",
            "notes"} == set(data)  # fmt: skip
    assert data["command"] == "dartprune bench decode" and data["settings"] == {"turns": 3}
    assert data["machine"]["threads"] == torch.get_num_threads() and data["machine"]["processor"]
    assert {"python", "dartprune", "torch", "transformers"} <= set(data["versions"])
    row = data["rows"][1]
    assert row["seconds"] == {"lower": pytest.approx(0.045), "median": 0.05, "upper": pytest.approx(0.055)}
    assert row["share_of_limit"] == pytest.approx(0.8) and data["rows"][0]["share_of_limit"] is None


def shown(table):
    from rich.console import Console

    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("what", ["kernel", "decode", "refresh", "trace"])
def test_tables_of_all_benchmarks(what):
    extra = {"dense_steps": 0.5, "parts": {"products": 0.01, "selection": 0.002}, "overhead": 0.02}
    (table,) = tables(result(what, **extra))
    text = shown(table)
    assert "case" in text and "pruned" in text and "50.000 (45.000 to 55.000)" in text
    wanted = {
        "kernel": ["2.00 (1.80 to 2.20)", "1.0", "50%", "2.50", "80%"],
        "decode": ["10.0", "2.00 (1.80 to 2.20)", "80%", "12"],
        "refresh": ["0.50", "products 10.0, selection 2.0"],
        "trace": ["+2.0%"],
    }[what]
    assert all(part in text for part in wanted), text
    lines = remarks(result(what, **extra))
    assert "cpu streams 40.0 GB/s (36.0 to 44.0)" in lines[0] and lines[-1] == "note: a remark"
    assert ("60.0% of a dense step's time" in lines[1]) == (what == "decode")


def memory_result():
    rows = [MemoryRow("case", "dart", spread(1e5), spread(3e5), spread(2e5), 250_000, 4_000_000, 3.2e6)]
    return Result("memory", CPU, {}, rows)


def test_table_of_memory():
    text = shown(tables(memory_result())[0])
    assert all(part in text for part in ("0.200 (0.180 to 0.220)", "0.250", "3.200", "4.000"))
    assert remarks(memory_result()) == []


def test_pictures(tmp_path):
    from matplotlib.figure import Figure

    for name, made in (("rows.png", result()), ("memory.svg", memory_result())):
        save_result(made, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    axes = Figure().subplots()
    draw_rows(axes, list(result().rows))
    assert [bar.get_width() for bar in axes.patches] == [1.0, 2.0]
    (marks,) = [line for line in axes.get_lines() if line.get_label() == "limit"]
    assert list(marks.get_xdata()) == [2.5] and list(marks.get_ydata()) == [2]  # in the row of the arm that it limits
    assert [text.get_text() for text in axes.texts] == ["case"] and axes.get_xlabel() == "times as fast as dense"
    axes = Figure().subplots()
    draw_memory(axes, list(memory_result().rows))
    assert [bar.get_width() for bar in axes.patches] == [3.2, 4.0]
