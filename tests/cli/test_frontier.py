"""`dartprune frontier` as a user meets it."""

from __future__ import annotations

import json

import pytest

from dartprune.demo import passages

pytest.importorskip("numba", reason="needs the extra cpu")

SMALL = ("--streams", 2, "--prompt", 12, "--lengths", "24,24", "--sparsity", "0.4", "--method", "sketch-dart")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, parts in passages().items():
        (folder / f"{name}.txt").write_text("\n".join(parts))
    return folder


def test_on_the_model_inside(run, texts, tmp_path):
    out = tmp_path / "out"
    code, told, err = run("frontier", "--texts", texts, *SMALL, "--weights", "int4,int3", "--out", out)
    assert code == 0, err
    for word in ("bits read for each", "bfloat16", "int3", "sketch-dart 0.4", str(out / "report.html")):
        assert word in told
    code, told, _ = run("frontier", "--texts", texts, *SMALL, "--weights", "int4,int3", "--out", out, "--json")
    data = json.loads(told)
    shown = [(p["weights"], p["method"]) for p in data["points"]]
    assert code == 0 and shown == [
        ("bfloat16", "dense"),
        ("bfloat16", "sketch-dart"),
        ("int4", "dense"),
        ("int4", "sketch-dart"),
        ("int3", "dense"),
    ]
    assert data["left_out"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--weights", "int9"), "unknown format of weights 'int9'"),
        (("--weights", "lost.gguf"), "or a GGUF file"),
        (("--method", "dartt"), "did you mean"),
        (("--sparsity", "2"), "between 0 and 1"),
        (("--lengths", "24"), "lengths must be two"),
        ((), "nothing to read"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(run, options, said, tmp_path):
    code, _, err = run("frontier", *options, "--out", tmp_path / "out")
    assert code == 2 and said in " ".join(err.split()) and "Traceback" not in err
    assert not (tmp_path / "out").exists()
