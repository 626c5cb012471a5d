"""`dartprune compare` as a user meets it."""

from __future__ import annotations

import json
import sys

import pytest

from dartprune.cli.main import main
from dartprune.demo import passages


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line in this process; gives exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dartprune", "compare", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return call


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, parts in passages().items():
        (folder / f"{name}.valid.txt").write_text("\n".join(parts))
    return folder


SMALL = ("--streams", 2, "--prompt", 12, "--lengths", "24,24", "--sparsity", "0.5")


def test_on_the_model_inside(run, texts, tmp_path):
    out = tmp_path / "out"
    options = (
        "--texts",
        texts,
        "--split",
        "valid",
        "--method",
        "static,dart",
        *SMALL,
        "--out",
        out,
        "--backend",
        "masked",
    )
    code, told, err = run(*options)
    assert code == 0, err
    for word in ("50% realised sparsity", "dense", "static", "dart", "0.500", str(out / "report.html")):
        assert word in told
    assert max(map(len, told.splitlines()[:8])) <= 80
    code, told, _ = run(*options, "--json")
    data = json.loads(told)
    assert code == 0 and [o["arm"] for o in data["outcomes"]] == ["dense", "static", "dart"] * 2
    assert data["settings"]["domains"] == sorted(passages()) and data["files"]["results.csv"] == str(
        out / "results.csv"
    )
    code, _, err = run(*options, "--seed", 1)
    assert code == 2 and "other settings (seed)" in err.replace("\n", " ")


def test_the_arms_are_listed(run):
    code, told, _ = run("--method", "list")
    assert code == 0 and "dart-release@N" in told and "griffin" in told
    assert set(json.loads(run("--arms", "list", "--json")[1])) >= {"dart", "clock-replay@N", "calibrated-wanda"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing to read: give --texts"),
        (("--texts", "/no/such/folder"), "/no/such/folder: there is no such file or folder"),
        (("--texts", "TEXTS", "--method", "static,drat"), "unknown arm 'drat': did you mean 'dart'"),
        (("--texts", "TEXTS", "--method", "calibrated-wanda"), "give --calibration FILE"),
        (("--texts", "TEXTS", "--arms", "static", "--versus", "dart"), "unknown arm for --versus 'dart'"),
        (("--texts", "TEXTS", "--sparsity", "1.2"), "between 0 and 1, got 1.2"),
        (("--texts", "TEXTS", "--sparsity", "a,b"), "--sparsity a,b: write numbers with commas"),
        (("--texts", "TEXTS", "--lengths", "128"), "two whole numbers"),
        (("--texts", "TEXTS", "--lengths", "4000,4000"), "no domain has a text of 8000 tokens"),
        (("--texts", "TEXTS/code.valid.txt", "--lengths", "80,40"), "a change of topic needs two domains"),
        (("--texts", "TEXTS", "--split", "test"), "of the split 'test'"),
        (("--texts", "TEXTS", "--backend", "maskd", *SMALL), "did you mean 'masked'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(run, args, message, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(str(a).replace("TEXTS", str(texts)) for a in args))
    assert code == 2, (out, err)
    assert message in err.replace("\n", ""), err
    assert "Traceback" not in err
