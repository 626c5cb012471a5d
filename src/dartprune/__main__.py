"""The command line, as `dartprune` and as `python -m dartprune`."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run it; one line and exit code 2 where what it is made of is not installed."""
    missing = [name for name in ("rich", "typer") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"error: the command line needs {' and '.join(missing)}: pip install 'dartprune[cli]'\n")
        sys.exit(2)
    from dartprune.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
