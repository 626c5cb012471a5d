"""Mistakes of a user: what the command line shows as one line, and what Python callers catch as ValueError."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """What was given cannot be used: one line that says what, where and what to do."""


class UserTypeError(UserError, TypeError):
    """What was given is of a kind that cannot be used; a TypeError too."""


@contextmanager
def user_file(path: Path | str) -> Iterator[None]:
    """Around the opening of a file that the user named: what the system says of it becomes a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (byte {error.start}): convert it, as with iconv") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file or folder") from error
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def read_user_text(path: Path) -> str:
    """The text of a file that the user named; UserError where it cannot be read or is not UTF-8."""
    with user_file(path):
        return path.read_text(encoding="utf-8")


def check_output_file(path: Path) -> None:
    """UserError, before the long work, unless a file can be written there; what stands there is left as it is."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    existed = path.exists()
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def make_output_folder(path: Path) -> None:
    """Make a folder for results; UserError, before the long work, unless files can be written into it."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: this is a file, and results need a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise _unwritable(path, error) from error


def require(module: str, what: str, extra: str = "eval") -> None:
    """UserError if a package of one of our extras is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what} needs the package {module}: pip install 'dartprune[{extra}]'")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: nothing can be written there ({(error.strerror or str(error)).lower()})")
