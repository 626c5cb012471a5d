"""Kernels on disk: found again, and compiled anew when any file that they are made of has changed."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("numba")

from dartprune.ffn.cpu import cache as cpu_cache

FOLDER = Path(cpu_cache.__file__).parent


def test_the_digest_sees_every_file_of_kernels(tmp_path):
    for file in FOLDER.glob("*.py"):
        shutil.copy(file, tmp_path)
    first = cpu_cache.digest(tmp_path)
    assert first == cpu_cache.digest(FOLDER)
    seen = {first}
    for name in ("blocks.py", "kernels.py", "cut.py", "selector_kernels.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        seen.add(cpu_cache.digest(tmp_path))
    assert len(seen) == 5


def test_a_folder_without_sources_is_no_state(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="no Python files"):
        cpu_cache.digest(tmp_path)


def test_a_kernel_is_kept_until_the_sources_change(tmp_path, monkeypatch):
    path = tmp_path / "twice.py"
    path.write_text(
        "from dartprune.ffn.cpu.cache import kernel\n\n\n@kernel()\ndef twice(x):\n    return 2 * x\n",
        encoding="utf-8",
    )

    def compiled(sources):
        """Hits and misses of the cache in a process that finds these sources."""
        monkeypatch.setattr(cpu_cache, "_sources", lambda: sources)
        spec = importlib.util.spec_from_file_location("twice", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.twice(21) == 42
        stats = module.twice.stats
        return sum(stats.cache_hits.values()), sum(stats.cache_misses.values())

    assert compiled("one") == (0, 1)
    assert compiled("one") == (1, 0)
    assert compiled("two") == (0, 1)
    assert compiled("two") == (1, 0)


def test_every_cached_kernel_goes_this_way():
    from dartprune.ffn.cpu import kernels as cpu_kernels
    from dartprune.ffn.cpu import selector_kernels as cpu_selector_kernels

    cached = [
        value
        for module in (cpu_kernels, cpu_selector_kernels)
        for value in vars(module).values()
        if isinstance(getattr(value, "_cache", None), cpu_cache._Kept)
    ]
    assert {function.__name__ for function in cached} >= {"single", "several_alone", "gate_rows", "sketch_rows_alone"}
    # Numba's own cache looks at one file alone
    assert not [file.name for file in FOLDER.glob("*.py") if re.search(r"njit\([^)]*cache=True", file.read_text())]
