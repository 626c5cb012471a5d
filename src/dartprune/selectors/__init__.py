"""Which of its neurons each token uses: `settings` of each way, and the sketches that one of them estimates by."""

from __future__ import annotations

from typing import Any

from dartprune.selectors.settings import (
    Exact,
    Sketch,
    TokenGate,
    TokenSelector,
    register_selector,
    register_token,
    token_kinds,
)

__all__ = [
    "Exact",
    "Sketch",
    "TokenGate",
    "TokenSelector",
    "register_selector",
    "register_token",
    "save_sketch",
    "token_kinds",
]


def __getattr__(name: str) -> Any:
    if name == "save_sketch":
        from dartprune.selectors.sketches import save_sketch

        return save_sketch
    raise AttributeError(f"module 'dartprune.selectors' has no attribute {name!r}")
