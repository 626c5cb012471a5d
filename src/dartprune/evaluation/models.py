"""What evaluations ask of a model and of the name of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dartprune.pruner import Pruner, presets


def pruner_from(method: str, sparsity: float | None = None, settings: Mapping[str, Any] | None = None) -> Pruner:
    """A preset with some settings changed.

    Args:
        method: name of the preset.
        sparsity: None for the preset's own; not looked at where the preset does not prune.
        settings: as in `Pruner.to_dict()`; a budget or refresh may be given by its kind alone.

    Raises:
        ValueError: an unknown name or value, with the nearest one that is known.
    """
    cls = presets.get(method)
    data = cls().to_dict()
    if sparsity is not None and cls.prunes:
        data["sparsity"] = sparsity
    for name, value in (settings or {}).items():
        data[name] = {"kind": value} if name in ("budget", "refresh") and isinstance(value, str) else value
    return Pruner.from_dict(data)


def context_length(model: Any) -> int:
    """Most tokens that a model takes; 2048 where its configuration does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text, by the model's generation settings and by its tokenizer."""
    config = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    found = given if isinstance(given, list) else [given]
    return sorted({int(token) for token in (*found, tokenizer.eos_token_id) if token is not None})
