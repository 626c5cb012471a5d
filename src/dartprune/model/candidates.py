"""A forward of a prompt and, behind it, candidates: run in two parts, since masks need the whole prompt first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dartprune.errors import UserError


def split_inputs(inputs: dict[str, Any], split: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of the first `split` tokens and of the rest."""
    if inputs.get("output_attentions"):
        raise UserError("output_attentions cannot be given together with candidates while a pruner is attached")
    head, tail = dict(inputs), dict(inputs)
    candidates = int(inputs["input_ids"].shape[1]) - split
    for name in ("input_ids", "position_ids", "token_type_ids"):
        if isinstance(inputs.get(name), Tensor):
            head[name], tail[name] = inputs[name][..., :split], inputs[name][..., split:]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor):
        head["attention_mask"] = mask[:, : mask.shape[1] - candidates]
    if "logits_to_keep" in inputs:
        head["logits_to_keep"], tail["logits_to_keep"] = 1, candidates
    return head, tail


def joined(first: Any, second: Any) -> Any:
    """The outputs of both parts as one, in the second's place."""
    second.logits = torch.cat((first.logits, second.logits), dim=1)
    if second.get("hidden_states") is not None:
        second.hidden_states = tuple(
            torch.cat(pair, dim=1) for pair in zip(first.hidden_states, second.hidden_states, strict=True)
        )
    return second
