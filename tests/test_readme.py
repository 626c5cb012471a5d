"""Every Python example of the README and of the contributing guide is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dartprune
from dartprune.demo import model_folder

ROOT = Path(__file__).resolve().parents[1]


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.S)


@pytest.mark.parametrize("number", range(len(blocks("README.md"))))
def test_readme_examples_run(number, monkeypatch, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    code = blocks("README.md")[number]
    for cls in (AutoModelForCausalLM, AutoTokenizer):
        # a name on the hub stands for any model; here the one inside the package is taken
        original = cls.from_pretrained
        monkeypatch.setattr(cls, "from_pretrained", lambda name, original=original, **k: original(model_folder(), **k))
    namespace = {}
    exec(compile(code, f"README.md, example {number}", "exec"), namespace)
    if "print" in code:
        assert capsys.readouterr().out.strip()


def test_there_are_examples():
    assert len(blocks("README.md")) >= 3
    assert "register_scorer" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_contributing_example_runs():
    namespace = {}
    exec(compile(blocks("CONTRIBUTING.md")[0], "CONTRIBUTING.md", "exec"), namespace)
    assert namespace["pruner"].scorer == "energy-times-norm"
    del dartprune.scoring._scorers._values["energy-times-norm"]
