"""Loads a model and its tokenizer by name or path; every mistake of the user ends in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dartprune.demo import model_folder

DEMO = "demo"


def load(name_or_path: str | None = None, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, padding on the left.

    Args:
        name_or_path: None or `demo` for the model inside the package (no network), a local folder, or a name on the
            Hugging Face hub.
        dtype: `auto` for the checkpoint's own, or a torch dtype's name such as `bfloat16`.
        device: where to put it; None leaves it on the CPU.

    Raises:
        ValueError: nothing can be loaded from there, or the tokenizer has neither a padding nor an end token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, local = _source(name_or_path)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}: write auto, float32, bfloat16 or float16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=local, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no model could be loaded from {source!r}: {reason}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {source!r} has neither a padding nor an end token: set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return model.eval(), tokenizer


def _source(name_or_path: str | None) -> tuple[str, bool]:
    """What transformers is given, and whether it must stay off the network."""
    if name_or_path is None or name_or_path == DEMO:
        return str(model_folder()), True
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name_or_path!r} holds no config.json: give the folder that save_pretrained() wrote")
        return str(path), True
    parts = name_or_path.split("/")
    is_name = len(parts) <= 2 and all(parts) and not name_or_path.startswith((".", "~"))
    if path.exists() or not is_name:
        raise ValueError(f"there is no model folder at {name_or_path!r}, and it is no name on the Hugging Face hub")
    return name_or_path, False
