"""The command line called in this process."""

from __future__ import annotations

import sys

import pytest

from dartprune.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line as wide as a large terminal; gives exit code, stdout and stderr."""

    def call(*args, columns=160):
        monkeypatch.setattr(sys, "argv", ["dartprune", *map(str, args)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return call
