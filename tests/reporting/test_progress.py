"""Progress without a terminal, and on one."""

from __future__ import annotations

from dartprune.reporting import progress
from dartprune.reporting.progress import Bar, bar


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Bar, "spoke", 1000.0)
    with bar("decoding", 100) as work:
        for _ in range(25):
            now[0] += 3
            work(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "decoding: 0:30 so far, 10 of 100, about 4:30 left",
        "decoding: 1:00 so far, 20 of 100, about 4:00 left",
    ]
    with bar("sketching", 24) as work:
        for seconds in (60, 2, 2, 28):  # the first layer waits for a compiler
            now[0] += seconds
            work(1)
    assert capsys.readouterr().err.splitlines() == [
        "sketching: 1:00 so far, 1 of 24",
        "sketching: 1:32 so far, 4 of 24, about 3:33 left",
    ]
    with bar("silent", 10, silent=True) as work:
        now[0] += 3600
        work(5)
    assert capsys.readouterr().err == ""
    with bar("starting") as work:
        now[0] += 3600
        work.tell("7 turns")
    assert capsys.readouterr().err == "7 turns: 1:00:00 so far\n"


def test_on_a_terminal_it_leaves_nothing_but_shows_what_is_at_work(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with bar("comparing [cpu]", 0) as work:
        work.expect(4)
        work.step("dart", 2)
        assert (work.done, work.total, work.text) == (2, 4, "dart")
        work.reach(1, total=8)
        assert (work.done, work.total) == (1, 8)
    assert "dart" in capsys.readouterr().err
