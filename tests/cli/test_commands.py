"""The command line as a user meets it: output, pictures, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dartprune.cli.main import main
from dartprune.errors import UserError


def test_generate_says_what_it_did(run, tmp_path):
    picture = tmp_path / "out.png"
    code, out, _ = run("generate", "once upon a time there was a little dog", "-n", 40, "--plot", picture)
    assert code == 0
    assert "realised sparsity" in out and "0.7" in out and f"picture: {picture}" in out.replace("\n", "")
    assert picture.stat().st_size > 10_000


def test_generate_as_json(run):
    code, out, _ = run("generate", "Question: What is", "-n", 12, "--json", "--sparsity", 0.5, "--method", "griffin")
    data = json.loads(out)
    assert code == 0 and data["pruner"]["preset"] == "griffin" and data["report"]["target_sparsity"] == 0.5
    assert data["new_tokens"] <= 12 and isinstance(data["text"], str)


@pytest.mark.parametrize(("method", "name"), [("gated-dart", "GatedDart"), ("sketch-dart", "SketchDart")])
def test_generate_with_a_token_selector(run, method, name):
    code, out, _ = run("generate", "once upon a time there was a little dog", "-n", 20, "--method", method)
    assert code == 0 and name in out and "realised sparsity" in out
    assert ("for the model" in out) and "0.7" in out


def test_generate_compares_three_arms(run):
    code, out, _ = run("generate", "The evening had drawn in before", "-n", 12, "--compare")
    assert code == 0
    assert all(name in out for name in ("Dense", "Static", "Dart", "tokens/s"))
    code, out, _ = run("generate", "The evening had drawn in before", "-n", 12, "--compare", "--json")
    arms = json.loads(out)["arms"]
    assert [arm["report"]["method"] for arm in arms] == ["Dense", "Static", "Dart"]
    assert all(len(arm["seconds"]) == 3 for arm in arms)


def test_the_prompt_can_come_from_standard_input(run, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def main(args):")))
    code, out, _ = run("generate", "-", "-n", 5, "--json")
    assert code == 0 and json.loads(out)["report"]["prompt_tokens"] > 2


def test_inspect(run, tmp_path, demo_config):
    layers, hidden, neurons = (demo_config[f] for f in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    picture = tmp_path / "budget.svg"
    code, out, _ = run("inspect", "--plot", picture)
    assert code == 0 and "llama (row of the table)" in out and picture.exists()
    assert f"{layers}, H={hidden}, I={neurons}" in out
    data = json.loads(run("inspect", "--json")[1])
    share = data["ffn_share_of_step_bytes"]
    assert share == pytest.approx(3 * layers * hidden * neurons / data["parameters"], rel=0.02)
    assert data["best_speedup"] == pytest.approx(1 / (1 - 0.7 * share))
    assert sum(layer["keep"] for layer in data["layers"]) == pytest.approx(0.3 * layers * neurons, abs=layers)


def test_generate_compares_the_methods_named_and_draws_them(run, tmp_path):
    picture = tmp_path / "arms.png"
    methods = ("--method", "griffin,clock-replay@8", "--method", "static")
    code, out, _ = run("generate", "once upon a time", "-n", 12, "--compare", *methods, "--plot", picture, "--json")
    arms = json.loads(out)["arms"]
    assert code == 0 and [arm["report"]["method"] for arm in arms] == ["Dense", "Griffin", "Dart", "Static"]
    assert picture.stat().st_size > 30_000


def test_inspect_and_generate_count_the_same_memory(run):
    held = json.loads(run("inspect", "--json")[1])["overhead_bytes_per_sequence"]
    report = json.loads(run("generate", "once upon a time", "-n", 4, "--json")[1])["report"]
    assert held == report["overhead_bytes_per_sequence"] > 0


def test_the_longest_bar_of_inspect_is_whole_on_a_narrow_terminal(run, monkeypatch):
    from dartprune.cli import inspect

    layer = {"layer": 0, "neurons": 10, "angle": 0.1, "change": 0.2, "sensitivity": 0.02, "keep": 10}
    data = {
        **{"family": "llama", "recognised": "table", "layers": [layer], "hidden": 8, "parameters": 1_000_000},
        **{"ffn_share_of_parameters": 0.5, "ffn_share_of_step_bytes": 0.5, "sparsity": 0.0, "best_speedup": 1.0},
        **{"backend": "cpu", "saves_time": True, "overhead_bytes_per_sequence": 1, "notes": ["install 'x[cpu]'"]},
    }
    monkeypatch.setattr(inspect, "_look", lambda *_: data)
    monkeypatch.setenv("COLUMNS", "80")
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()) as said:
        inspect._show(data)
    assert "█" * inspect.BAR + " " in said.getvalue() and "note: install 'x[cpu]'" in said.getvalue()


def test_a_text_that_leaves_the_context(run, monkeypatch):
    from torch import nn

    from dartprune.cli import generate

    class Small(nn.Module):
        config = type("Config", (), {"max_position_embeddings": 64})

        def __init__(self, table):
            super().__init__()
            self.add_module("wpe" if table else "other", nn.Embedding(64, 4))

    with pytest.raises(
        UserError, match="10 tokens and 55 new ones leave the model's context of 64: ask for at most 54"
    ):
        generate._check_context(Small(table=True), 10, 55)
    generate._check_context(Small(table=True), 10, 54)
    monkeypatch.setattr(generate, "_decode", lambda *_: (_ for _ in ()).throw(UserError("enough seen")))
    for new in (2300, 100_000_000):
        code, _, err = run("generate", "once upon a time", "-n", new)
        assert code == 2 and f"and {new} new ones leave the model's context of 2048" in err
        assert len(err.splitlines()) == 2 and err.startswith("note: ")


def test_a_plugin_is_run_first(run, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dartprune import Static\n"
        "from dartprune.evaluation.arms import register_arm\n\n\n"
        "@register_arm('half', 'Static at half the sparsity')\n"
        "def half(sparsity, number, calibration):\n    return Static(sparsity=sparsity / 2)\n"
    )
    from dartprune.evaluation.arms import arm_kinds

    try:
        code, out, _ = run("--plugin", plugin, "generate", "once upon a time", "-n", 4, "--method", "half", "--json")
        assert code == 0 and json.loads(out)["report"]["target_sparsity"] == 0.35
    finally:
        arm_kinds._values.pop("half", None)
    code, _, err = run("--plugin", tmp_path / "none.py", "demo")
    assert code == 2 and "none.py: there is no such file" in err


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    from dartprune.cli import inspect

    monkeypatch.setattr(inspect, "_look", lambda *_: (_ for _ in ()).throw(ValueError("a bug")))
    monkeypatch.setattr(sys, "argv", ["dartprune", "inspect"])
    with pytest.raises(ValueError, match="a bug"):
        main()


def test_former_names_of_options(run):
    code, out, _ = run("compare", "--arms", "list")
    assert code == 0 and "clock-replay@N" in out
    assert "--arms" not in run("compare", "--help")[1]


def test_as_a_module_and_in_a_shell():
    done = subprocess.run([sys.executable, "-m", "dartprune", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("dartprune 0.")
    asked = {"_DARTPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "dartprune comp", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "dartprune"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["compare"]


def test_what_is_not_utf8(run, tmp_path, monkeypatch):
    import io

    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    code, _, err = run("inspect", "--text", tmp_path / "latin.txt")
    assert code == 2 and "latin.txt: not text in UTF-8 (byte 3)" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    code, _, err = run("generate", "-")
    assert code == 2 and "standard input: not text in UTF-8 (byte 0)" in err


def test_version_and_help(run):
    assert run("--version")[1].startswith("dartprune 0.")
    for command in ("generate", "inspect", "demo"):
        code, out, _ = run(command, "--help")
        assert code == 0 and "Example:" in out and run(command, "-h")[1] == out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", " "), "the prompt is empty"),
        (("generate", "x", "--sparsity", "1.7"), "sparsity must be a number in [0, 1), got 1.7"),
        (("generate", "x", "--sparsity", "abc"), "error: invalid value for '--sparsity'"),
        (("generate", "x", "-s=abc", "-n", "3"), "got 'abc'"),
        (("generate", "x", "--sparsity", "abc", "-n", "3"), "got 'abc'"),
        (("generate", "x", "--sparsity", "nan"), "got nan"),
        (("generate", "x", "--method", "DART", "--plot", "a.gif"), "must end in .png"),
        (("generate", "x", "--method", "DART"), "did you mean 'dart'"),
        (("generate", "x", "--backend", "CPU"), "did you mean 'cpu'"),
        (("generate", "x", "--seed", "1", "--seed", "2"), "--seed is given 2 times and takes one value"),
        (("generate", "x", "--method", "dart,static"), "several methods need --compare"),
        (("generate", "x", "--plot", "/proc/x.png"), "/proc/x.png: nothing can be written there"),
        (("compare", "--texts", "a.txt"), "a.txt: there is no such file"),
        (("demo", "--out", "/proc/here"), "/proc/here: nothing can be written there"),
        (("demo", "--out", "/etc/passwd"), "/etc/passwd: this is a file"),
        (("generate", "x", "--sparsity", "-0.2"), "got -0.2"),
        (("generate", "x", "--method", "drat"), "did you mean 'dart'"),
        (("generate", "x", "--backend", "maskd"), "did you mean 'masked'"),
        (("generate", "x", "--dtype", "float99"), "unknown dtype 'float99'"),
        (("generate", "x", "--device", "nonsense"), "device 'nonsense' cannot be used"),
        (("generate", "x", "--model", "/no/such/model"), "there is no model folder or .gguf file at '/no/such/model'"),
        (("generate", "x", "--plot", "/no/such/folder/a.png"), "there is no folder /no/such/folder"),
        (("generate", "x", "--plot", "a.gif"), "must end in .png"),
        (("generate", "x", "--chat"), "no chat template"),
        (("generate", "x", "-n", "0"), "greater than or equal to 1"),
        (("inspect", "--text", "/no/such/file"), "/no/such/file: there is no such file"),
        (("inspect", "--model", "."), "holds no config.json"),
        (("nonsense",), "no such command"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert code == 2, (out, err)
    assert message in err.replace("\n", ""), err
    assert "Traceback" not in err and len(err.splitlines()) == 1


def test_a_tokenizer_without_pad_and_end(run, tmp_path):
    from dartprune.loading import load

    model, tokenizer = load()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = run("generate", "x", "--model", tmp_path)
    assert code == 2 and "neither a padding nor an end token" in err


def test_a_name_on_the_hub_without_network(tmp_path):
    """Really asks the loading code; offline mode answers at once."""
    done = subprocess.run(
        [sys.executable, "-m", "dartprune.cli.main", "generate", "x", "--model", "nobody/nothing"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no model could be loaded from 'nobody/nothing'" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_detaches_and_ends_with_130(run, monkeypatch):
    from dartprune import run as run_module
    from dartprune.runtime import model_hooks as forwards

    detached = []
    monkeypatch.setattr(forwards.Forwards, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    original = run_module.Run.detach
    monkeypatch.setattr(run_module.Run, "detach", lambda self: (original(self), detached.append(self)))
    code, _, err = run("generate", "once upon a time", "-n", 5)
    assert code == 130 and "interrupted" in err and len(detached) == 1


@pytest.mark.parametrize("compare", [False, True])
def test_after_ctrl_c_what_was_decoded_is_shown(run, monkeypatch, compare):
    from dartprune.runtime import model_hooks as forwards

    finish, steps = forwards.Forwards.finish, []

    def stop_at_the_fourth(self, *given):
        steps.append(1)
        if len(steps) == (4 if not compare else 14):
            raise KeyboardInterrupt
        return finish(self, *given)

    monkeypatch.setattr(forwards.Forwards, "finish", stop_at_the_fourth)
    options = ("--compare", "--method", "static") if compare else ("--method", "static")
    code, out, err = run("generate", "once upon a time there was a little girl who lived", "-n", 10, *options)
    assert code == 130 and "interrupted" in err
    if compare:  # ten forwards of the dense arm, and three of the other
        assert "--- Dense" in out and "--- Static" in out
    else:
        assert "2 pruned, 0 dense" in out and "tokens/s in decode forwards" in out


def test_notes_name_their_arm(run):
    code, out, _ = run("generate", "once upon", "--compare", "--method", "static,clock", "-n", 12)
    assert code == 0
    said = " ".join(out.split())
    assert "Clock, realised sparsity: 8 of 11 decoded tokens were dense: 8 at the start" in said
    assert "Static, realised sparsity: " in said and "prompt was too short for masks" in said


def test_importing_is_quick_and_patches_nothing():
    code = (
        "import sys, dartprune; assert 'torch' not in sys.modules; print(sorted(set(sys.modules) & {'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
