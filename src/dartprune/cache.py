"""Where what took long to work out is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where worked-out proxies and fetched models are kept: `DARTPRUNE_CACHE`, else `~/.cache/dartprune`."""
    return Path(os.environ.get("DARTPRUNE_CACHE") or Path.home() / ".cache" / "dartprune")
