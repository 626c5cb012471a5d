"""`dartprune compare` as a user meets it."""

from __future__ import annotations

import json

import pytest

from dartprune.demo import passages


@pytest.fixture
def compare(run):
    """Call `dartprune compare` on a narrow terminal."""
    return lambda *args: run("compare", *args, columns=80)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, parts in passages().items():
        (folder / f"{name}.valid.txt").write_text("\n".join(parts))
    return folder


SMALL = ("--streams", 2, "--prompt", 12, "--lengths", "24,24", "--sparsity", "0.5")


def test_on_the_model_inside(compare, texts, tmp_path):
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
    code, told, err = compare(*options)
    assert code == 0, err
    for word in ("50% realised sparsity", "dense", "static", "dart", "0.500", str(out / "report.html")):
        assert word in told
    assert max(map(len, told.splitlines()[:8])) <= 80
    code, told, _ = compare(*options, "--json")
    data = json.loads(told)
    assert code == 0 and [o["arm"] for o in data["outcomes"]] == ["dense", "static", "dart"] * 2
    assert data["settings"]["domains"] == sorted(passages()) and data["files"]["results.csv"] == str(
        out / "results.csv"
    )
    code, _, err = compare(*options, "--seed", 1)
    assert code == 2 and "other settings (seed)" in err.replace("\n", " ")


def test_after_ctrl_c_the_same_command_goes_on(compare, texts, tmp_path, monkeypatch):
    from dartprune.evaluation.compare import run as module

    out = tmp_path / "out"
    options = ("--texts", texts, "--method", "static", *SMALL, "--kinds", "one-topic", "--versus", "static")
    real, done = module.measure, []

    def stopped(*given, **named):
        if len(done) == 1:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(given[1].name)
        return real(*given, **named)

    monkeypatch.setattr(module, "measure", stopped)
    code, _, err = compare(*options, "--out", out)
    said = "".join(err.split())
    assert code == 130 and f"what is done lies in {out}: the same command goes on".replace(" ", "") in said
    code, _, err = compare(*options, "--out", out)
    assert code == 0, err
    assert done == ["Dense", "stopped", "Static"], "what was done is not done again"


def test_out_is_looked_at_before_anything_is_read(compare, texts, monkeypatch, tmp_path):
    def read(*given, **named):
        raise AssertionError("read before --out was looked at")

    monkeypatch.setattr("dartprune.loading.load", read)
    monkeypatch.setattr("dartprune.evaluation.texts.read_texts", read)
    (tmp_path / "file").write_text("")
    code, _, err = compare("--texts", texts, *SMALL, "--out", tmp_path / "file" / "out")
    assert code == 2 and "file/out" in "".join(err.split()) and "Traceback" not in err


def test_the_arms_are_listed(compare):
    code, told, _ = compare("--method", "list")
    assert code == 0 and "dart-release@N" in told and "griffin" in told
    assert set(json.loads(compare("--arms", "list", "--json")[1])) >= {"dart", "clock-replay@N", "calibrated-wanda"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing to read: give --texts"),
        (("--texts", "/no/such/folder"), "/no/such/folder: there is no such file or folder"),
        (("--texts", "TEXTS", "--method", "static,drat"), "unknown method 'drat': did you mean 'dart'"),
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
def test_mistakes_are_one_line_and_exit_code_two(compare, args, message, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = compare(*(str(a).replace("TEXTS", str(texts)) for a in args))
    assert code == 2, (out, err)
    assert message in err.replace("\n", ""), err
    assert "Traceback" not in err


@pytest.fixture
def plugin(tmp_path):
    """A file with an arm, which every process must run to know it."""
    path = tmp_path / "more.py"
    path.write_text(
        "import dartprune\n"
        "from dartprune.evaluation.arms import register_arm\n"
        "@register_arm('eager', 'an arm of the user')\n"
        "def eager(sparsity, number, calibration):\n"
        "    return dartprune.Static(sparsity=sparsity, budget=dartprune.DepthAware())\n"
    )
    return path


def test_processes_share_the_arms_and_change_no_figure(run, texts, tmp_path, plugin):
    options = ("--texts", texts, "--method", "static,dart,eager", *SMALL, "--kinds", "changing", "--json")
    from dartprune.evaluation.arms import arm_kinds

    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arm_kinds._values.pop("eager", None)
        code, told, err = run("--plugin", plugin, "compare", *options, "--out", out, "--processes", processes)
        assert code == 0, err
        found.append(json.loads(told))
        assert sorted(path.name for path in out.glob("*.jsonl")) == ["journal.jsonl"], "one journal is left"
    arm_kinds._values.pop("eager", None)
    for data in found:
        del data["files"]
    assert found[0] == found[1]
    assert [o["arm"] for o in found[1]["outcomes"]] == ["dense", "static", "dart", "eager"]


def test_what_another_process_did_is_kept_and_what_it_refuses_is_told(compare, texts, tmp_path, monkeypatch):
    from dartprune.evaluation.compare import run as module

    out = tmp_path / "out"
    options = ("--texts", texts, "--method", "static,griffin", *SMALL, "--kinds", "one-topic", "--versus", "static")
    code, _, err = compare(*options, "--out", out)
    assert code == 0, err
    # as if a second process had done the whole, and the first nothing
    (out / "journal.jsonl").rename(out / "journal.part-1.jsonl")
    monkeypatch.setattr(module, "measure", None)
    code, _, err = compare(*options, "--out", out)
    assert code == 0, err
    assert not (out / "journal.part-1.jsonl").exists()

    from dartprune.cli import shares
    from dartprune.errors import UserError

    def refused(self):
        raise UserError("no such model")

    lines = []

    class Line:
        send = lines.append

    monkeypatch.setattr(shares.Job, "begin", refused)
    monkeypatch.setattr(shares.signal, "signal", lambda *_: None)
    job = shares.Job(None, "auto", None, {}, {}, None, [], "auto")
    shares._work(job, out / "x", {}, 1, Line)
    assert lines == ["no such model"]
