"""Rows of the family table, and how modules are found by them; models that have nothing to prune."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dartprune.errors import UserError, UserTypeError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts: paths from the model (`layers`) or from one decoder layer (the rest).

    gate: empty for a plain or fused FFN.  fused: `up` gives gate and up together, gate first.
    norm: the norm before the FFN; empty where the FFN reads the residual stream itself.  norm_if: a flag of the layer
    that must be true for the norm to come before.  contribution: empty where the FFN's own output is added.
    scale: name of the layer's factor on it.  act: name of the activation, found by itself if empty.
    inline: the projections belong to the layer, there is no FFN module.
    """

    layers: str
    entry: str
    up: str
    down: str
    attention_output: str
    gate: str = ""
    norm: str = ""
    norm_if: str = ""
    contribution: str = ""
    scale: str = ""
    act: str = ""
    fused: bool = False
    inline: bool = False

    def but(self, **changes: Any) -> Family:
        """The same row with changes."""
        return replace(self, **changes)


def at(module: nn.Module, path: str) -> Any:
    """The part at a dotted path; ValueError saying what is missing."""
    part: Any = module
    for name in path.split("."):
        if not hasattr(part, name):
            raise UserError(f"{type(module).__name__} has no {path!r} ({type(part).__name__} has no {name!r})")
        part = getattr(part, name)
    return part


def first_of(module: nn.Module, paths: str) -> Any:
    """The first of several paths, separated by `|`, that exists; ValueError if none does."""
    for path in paths.split("|"):
        part: Any = module
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is not None:
            return part
    raise UserError(f"{type(module).__name__} has none of {', '.join(paths.split('|'))}")


def core_of(model: Any) -> Any:
    """The transformers model inside torch.compile's and PEFT's shells; TypeError for anything else."""
    core = model
    while True:
        inner = getattr(core, "_orig_mod", None)
        if (
            inner is None
            and hasattr(core, "peft_config")
            and hasattr(core, "base_model")
            and hasattr(core, "get_base_model")
        ):
            inner = core.get_base_model()
        if inner is None or inner is core:
            break
        core = inner
    if not isinstance(core, nn.Module) or not hasattr(core, "config"):
        raise UserTypeError(f"a transformers model is needed, got {type(model).__name__}")
    return core


def refuse_by_kind(core: Any) -> None:
    """ValueError for models that have no decoder FFN to prune."""
    config = core.config
    name = type(core).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model: only decoder-only models can be pruned")
    text = config.get_text_config()
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 1:
            raise UserError(f"{name} is a mixture-of-experts model ({key}={value}): only dense FFNs can be pruned")
    if not callable(getattr(core, "generate", None)) or _encodes(core):
        raise UserError(f"{name} is no model that generates text: load it with AutoModelForCausalLM")


def _encodes(core: Any) -> bool:
    """Encoders of the BERT kind have a causal head too, but attend to both sides unless told otherwise."""
    encoders = ("bert", "roberta", "electra", "camembert", "xlm-roberta")
    return str(core.config.model_type) in encoders and not getattr(core.config, "is_decoder", False)
