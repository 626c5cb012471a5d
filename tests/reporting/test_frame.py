"""A folder of results holds what was given, and its page shows it."""

from __future__ import annotations

import csv
import json

from matplotlib.figure import Figure

from dartprune.reporting.frame import Frame
from dartprune.reporting.plot import COLOURS, legend_beside, look, shades


def figure():
    made = Figure()
    made.subplots().plot([1, 2], [3, 4])
    return made


def test_every_file_and_the_page_first(tmp_path):
    frame = Frame(tmp_path / "a" / "b", "A <title>")
    frame.json("data", {"x": [1, None]})
    frame.csv("rows", ({"a": i, "b": None} for i in range(3)))
    frame.csv("empty", [])
    frame.picture("line", figure(), "a line")
    paths = frame.close({"seed": 7})
    assert [path.name for path in paths] == ["report.html", "data.json", "rows.csv", "line.png", "line.svg"]
    assert sorted(tmp_path.glob("a/b/*")) == sorted(paths)
    assert json.loads(paths[1].read_text()) == {"x": [1, None]}
    with paths[2].open() as file:
        assert list(csv.DictReader(file)) == [{"a": str(i), "b": ""} for i in range(3)]
    assert paths[3].read_bytes()[1:4] == b"PNG" and b"<svg" in paths[4].read_bytes()
    page = paths[0].read_text()
    assert "A &lt;title&gt;" in page and page.count("<img") == 1 and "&quot;seed&quot;: 7" in page


def test_lines_can_be_told_apart():
    pairs = {(look(n)["color"], str(look(n)["linestyle"])) for n in range(28)}
    assert len(pairs) == 28 and {look(n)["color"] for n in range(7)} == set(COLOURS)
    assert len({tuple(shade) for shade in shades(12)}) == 12 and shades(1)


def test_a_legend_follows_the_ends_of_the_lines():
    axes = Figure().subplots()
    for name in ("low", "high"):
        axes.plot([0, 1], label=name)
    legend_beside(axes, {"low": 1.0, "high": 2.0})
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["high", "low"]
    legend_beside(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["low", "high"]
