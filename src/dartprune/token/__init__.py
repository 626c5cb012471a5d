"""Which of its neurons each token uses: settings (`selector`), their live forms in one layer (`layer`), sketches."""

from __future__ import annotations

from typing import Any

from dartprune.token.selector import Exact, Sketch, TokenGate, TokenSelector, register_token, token_kinds

__all__ = ["Exact", "Sketch", "TokenGate", "TokenSelector", "register_token", "save_sketch", "token_kinds"]


def __getattr__(name: str) -> Any:
    if name == "save_sketch":
        from dartprune.token.sketching import save_sketch

        return save_sketch
    raise AttributeError(f"module 'dartprune.token' has no attribute {name!r}")
