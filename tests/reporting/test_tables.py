"""Tables and lines show every character that they are given."""

from __future__ import annotations

from dartprune.reporting.tables import facts, grid, say, show


def test_brackets_are_no_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    hint = "pip install 'dartprune[cpu]'"
    show(facts([("note: backend", hint)]), grid(["arm", "[s]"], [[hint, "[bold]1"]], title=f"with {hint}"))
    say(hint, style="red")
    say(hint, error=True)
    out, err = capsys.readouterr()
    assert out.count(hint) == 4 and "[s]" in out and "[bold]1" in out and err == hint + "\n"


def test_figures_stand_to_the_right(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    show(grid(["arm", "sparsity", "verdict"], [["dart", "0.7", "yes"]], words=("verdict",), frame=False))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["arm  sparsity verdict", "dart      0.7 yes"]
