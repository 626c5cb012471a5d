"""Python files of the user's that are run before a command: they register scorers, arms and the like."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from dartprune.errors import UserError, user_file

ran: list[Path] = []  # for the command under way, in their order


def run_plugins(paths: Iterable[Path]) -> None:
    """Run each file as a module of its own; ValueError for one that cannot be read or is no Python file."""
    ran.clear()
    for path in paths:
        _run(path, f"dartprune_plugin_{len(ran)}")
        ran.append(path)


def _run(path: Path, name: str) -> None:
    with user_file(path):
        path.open("rb").close()
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: the name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look for their module there
    spec.loader.exec_module(module)
