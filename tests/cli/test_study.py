"""`dartprune study` as a user meets it."""

from __future__ import annotations

import json

import pytest

from dartprune.demo import passages

SHORT = ("--prompt-tokens", 16, "--before", 20, "--after", 40, "--early", 16, "--horizon", 20)


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def topics(tmp_path):
    """Two files with the package's own passages."""
    for name in ("novels", "code"):
        (tmp_path / f"{name}.txt").write_text("\n<|doc|>\n".join(passages()[name]))
    return tmp_path / "novels.txt", tmp_path / "code.txt"


def test_forced(run, topics, tmp_path):
    args = (
        "study",
        "--texts",
        *topics,
        "--streams",
        2,
        "--arms",
        "dart-frozen,dart-release@30,dart",
        "--layers",
        "last",
        "--out",
        "s",
        *SHORT,
    )
    code, out, _ = run(*args, "--json")
    data = json.loads(out)
    assert code == 0 and [row["arm"] for row in data["arms"]] == [
        "dense",
        "dart-frozen",
        "dart-release@30",
        "dart",
        "dense",
        "dart-frozen",
        "dart",
    ]
    assert data["texts"]["change"] and {*data["texts"]["change"]} <= {"novels > code", "code > novels"}
    assert len(data["recovery"]) == 1 and (tmp_path / "s" / "report.html").stat().st_size > 100_000
    assert data["dtype"] == "bfloat16" and data["notes"][1].startswith("Each stretch of a text begins with token ")
    # two texts decide nothing
    assert data["recovery"][0]["verdict"] == "undecided"
    assert data["verdict"].startswith("Whether the model recovers when released at 30 is undecided")
    code, _, err = run(*args, "--seed", 5)
    assert code == 2 and "holds results of other settings (settings, texts)" in err


def test_after_ctrl_c_the_same_command_goes_on(run, topics, monkeypatch):
    from dartprune.evaluation.study import run as module

    options = ("--streams", 1, "--control", 0, "--layers", "last", "--method", "dart-frozen", *SHORT)
    real, done = module.run_unit, []

    def stopped(*given, **named):
        if len(done) == 1:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(given[1].name)
        return real(*given, **named)

    monkeypatch.setattr(module, "run_unit", stopped)
    code, _, err = run("study", "--texts", *topics, "--out", "s", *options)
    assert code == 130 and "what is done lies in s: the same command goes on from there" in " ".join(err.split())
    code, out, _ = run("study", "--texts", *topics, "--out", "s", *options)
    assert code == 0 and "report: s/report.html" in out
    assert done == ["dense", "stopped", "dart-frozen"], "what was done is not done again"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_free(run, tmp_path):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    code, out, _ = run(
        *("study", "--mode", "free", "--streams", 2, "--control", 0, "--arms", "dart-frozen,dart-release@30"),
        *("--layers", "last", "--out", "f", *SHORT[:5], 80, *SHORT[6:]),
    )
    assert code == 0 and "dart-release@30" in out and "report: f/report.html" in out
    data = json.loads((tmp_path / "f" / "report.json").read_text())
    assert data["text_quality"]["dense"]["after"]["rouge1"] == 1
    assert [row["release"] for row in data["escapes"]] == [30] and "4-grams that return" in out
    assert 0 <= data["text_quality"]["dense"]["after"]["names_second"] <= 1
    assert 0 <= data["text_quality"]["dart-frozen"]["after"]["rougeL"] <= 1
    wrote = json.loads((tmp_path / "f" / "written.json").read_text())
    frozen, released = wrote["dart-frozen"], wrote["dart-release@30"]
    assert len(frozen["after"]) == 2 and frozen["before"] == released["before"]
    assert [claim["answer"] for claim in data["claims"]] == ["undecided"] * 3, "no one-topic texts"


def test_a_model_without_a_chat_template_is_named(run):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    code, _, err = run("study", "--mode", "free", "--chat", "--streams", 1, "--out", "f")
    assert code == 2 and "tokenizer has no chat template" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--before", 10), "before the change has 10 decoded tokens, fewer than two windows of 10"),
        (("--arms", "statik"), "did you mean 'static'"),
        (("--arms", "dart-release@895"), "the text ends at decoded token 900"),
        (("--layers", "first,99"), "unknown layer '99': write first, middle, last, or 0 to "),
        (("--spaces", "residuals"), "did you mean 'residual'"),
        (("--mode", "forcd"), "did you mean 'forced'"),
        (("--prompt", "x"), "belong to --mode free"),
        (("--chat",), "--chat and --similarity belong to --mode free"),
        (("--mode", "free"), "--texts belongs to --mode forced"),
        (("--sparsity", 1.5), "sparsity must be a number in [0, 1)"),
        (("--after", 4000), "no domain has a text of"),
    ],
)
def test_mistakes_are_one_line(run, topics, args, said):
    code, _, err = run("study", "--texts", *topics, "--streams", 1, "--control", 0, *_with_short(args))
    assert code == 2 and said in err and "Traceback" not in err, err


def _with_short(args):
    """The short layout, unless the mistake is about lengths."""
    lengths = {"--before", "--after", "--arms"} & set(args)
    return args if lengths else (*SHORT, "--method", "dart-frozen", *args)


def test_more_mistakes(run, topics, tmp_path):
    first, _ = topics
    (tmp_path / "other.txt").write_text(first.read_text())
    for args, said in (
        ((), "--mode forced needs --texts"),
        (("--texts", first), "two different topics, got only novels"),
        (("--texts", first, tmp_path / "other.txt"), "'novels' and 'other' have the same text"),
        (("--texts", "nowhere"), "no such file or folder"),
        (("--mode", "free", "--prompt", " "), "--prompt is empty"),
        (("--mode", "free", "--bridge", "x"), "--bridge belongs to --prompt"),
        (("--mode", "free", "--prompts", "p.json", "--prompt", "x"), "either --prompt or --prompts"),
        (("--mode", "free", "--prompts", "p.json"), "p.json: there is no such file"),
        (("--mode", "free", "--similarity", tmp_path), "holds no encoder"),
    ):
        code, _, err = run("study", *SHORT, "--method", "dart-frozen", *args)
        assert code == 2 and said in err and "Traceback" not in err, (args, err)
