"""The script that prints the tables of docs/measurements.md reads every committed result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_of_the_committed_results_are_printed():
    if not (ROOT / "benchmarks" / "results").is_dir():
        pytest.skip("no benchmarks beside the tests")
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), str(ROOT / "benchmarks" / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured = (ROOT / "docs" / "measurements.md").read_text()
    for line in done.stdout.splitlines():
        if line.startswith("| bfloat16, one sequence"):
            cells = line.split("|")
            assert "|".join(cells[:4]) in measured, line
