"""Which of its neurons each token uses: settings (`selector`) and their live forms in one layer (`layer`)."""

from __future__ import annotations

from dartprune.token.selector import Exact, TokenSelector, register_token, token_kinds

__all__ = ["Exact", "TokenSelector", "register_token", "token_kinds"]
