"""`dartprune advise`: measured, told, and a call that runs."""

from __future__ import annotations

import json
import re

import pytest

import dartprune
from dartprune.cli import advise
from dartprune.demo import passages


@pytest.fixture(autouse=True)
def one_passage(monkeypatch):
    """Fewer answers than for people."""
    monkeypatch.setattr("dartprune.demo.passages", lambda: dict(list(passages().items())[:2]))


def test_what_is_worth_it_is_said_with_its_call(run):
    code, out, _ = run("advise", "--method", "sketch-dart", "-s", "0.3", "-n", "16", "--times", "0", "--loss", "9")
    assert code == 0 and "worth it" in out and "Use sketch-dart at 0.3:" in out
    call = re.search(r"with (dartprune\.\S+)\(model\):", out).group(1)
    assert call == "dartprune.SketchDart(sparsity=0.3)"
    assert eval(call, {"dartprune": dartprune}) == dartprune.SketchDart(sparsity=0.3)


@pytest.mark.parametrize("arm", ["dart", "sketch-dart", "griffin", "dart-depth-aware", "per-token"])
def test_every_call_makes_the_arm(arm):
    import dartprune.evaluation.arms
    from dartprune.evaluation.arms import arm as arm_named

    assert eval(advise._call(arm, 0.4), {"dartprune": dartprune}) == arm_named(arm).build(0.4)


def test_as_json(run):
    code, out, _ = run("advise", "-s", "0.4", "-n", "16", "--times", "99", "--backend", "masked", "--json")
    told = json.loads(out)
    assert code == 0 and told["best"] is None and told["advice"][0] == "Leave this model dense."
    assert [f["arm"] for f in told["findings"]] == ["dense", "sketch-dart", "dart"]
    assert all(f["slow_because"] for f in told["findings"][1:])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "dense"), "--method dense at 0.3: it prunes nothing"),
        (("-s", "0"), "--method sketch-dart at 0: it prunes nothing"),
        (("--method", "drat"), "drat"),
        (("-s", "much"), "--sparsity much: write numbers"),
        (("-s", "1.5"), "1.5"),
    ],
)
def test_mistakes_are_one_line(run, args, message):
    code, _, err = run("advise", *args)
    assert code == 2 and message in err and "Traceback" not in err
