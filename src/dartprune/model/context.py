"""How many tokens a model takes."""

from __future__ import annotations

from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(model: Any) -> int | None:
    """Most tokens of a text by the configuration of a model (or by the configuration itself); None where it has none.

    Models with relative positions (ALiBi, recurrent layers) say nothing and have no such end.
    """
    config = getattr(model, "config", model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def depth(core: Any) -> int | None:
    """How many layers the model's configuration has run."""
    layers = getattr(core.config.get_text_config(), "num_hidden_layers", None)
    return layers if isinstance(layers, int) else None
