"""The documentation: the site builds without a broken link, and every public name is on the page of the API."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dartprune

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_documented():
    page = (ROOT / "docs/api.md").read_text()
    shown = re.findall(r"^::: (dartprune\.[\w.]+)$", page, flags=re.M)
    for path in shown:  # what is named there is there
        module, _, name = path.rpartition(".")
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), name), path
    names = {path.rpartition(".")[2] for path in shown}
    for name in set(dartprune.__all__) - {"presets"}:
        assert name in names, name
        assert inspect.getdoc(getattr(dartprune, name)), name
    assert "`dartprune.presets`" in page


def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    api = (tmp_path / "site/api/index.html").read_text()
    for name in ("dartprune.pruner.SketchDart", "dartprune.quantisation.quantise", "dartprune.run.Run"):
        assert f'id="{name}"' in api


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith(("|", "[![", "![", "`")), line
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
