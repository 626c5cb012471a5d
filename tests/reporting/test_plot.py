"""Pictures: what is drawn is what the report says."""

from __future__ import annotations

from matplotlib.figure import Figure

from dartprune.report import Event, SequenceReport
from dartprune.reporting.plot import draw_budget, draw_similarity, save_budget


def sequence(similarities, events):
    return SequenceReport(0, 10, 10, 0, 80, 0.5, events, [1, 2], similarities)


def test_windows_that_do_not_follow_each_other_are_not_joined():
    axes = Figure().subplots()
    windows = [(8, 0.9, 0.5), (16, 0.8, 0.5), (24, 0.3, 0.5), (80, 0.9, 0.6), (88, 0.7, 0.6)]
    events = [Event("replay", 0, 34, 24), Event("settle", 0, 74, 64)]
    draw_similarity(axes, sequence(windows, events), change=20)
    drawn = [list(line.get_xdata()) for line in axes.get_lines()]
    assert [8, 16, 24] in drawn and [80, 88] in drawn and [8, 16, 24, 80, 88] not in drawn
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"similarity of a window", "threshold", "replay", "settle", "the topic changes"}


def test_a_sequence_without_windows_says_so(tmp_path):
    axes = Figure().subplots()
    draw_similarity(axes, sequence([], []))
    assert "judged no window" in axes.texts[0].get_text()
    draw_budget(axes, [0, 1], [0.25, 0.5])
    assert [round(bar.get_height(), 2) for bar in axes.patches] == [0.25, 0.5]
    layers = [{"layer": i, "sensitivity": 0.1 * i, "keep": 10, "neurons": 40} for i in range(3)]
    save_budget(layers, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").stat().st_size > 5000
