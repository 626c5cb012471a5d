"""Recognises families without a row by the usual shape of a decoder layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from dartprune.model.taking import Family

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
FUSED = (("gate_up_proj", "down_proj"),)
PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"))
OUTPUTS = ("o_proj", "out_proj", "wo", "dense", "c_proj")
NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ffn_norm", "ln_2", "norm2", "final_layer_norm")
AFTER = ("post_feedforward_layernorm", "post_mlp_layernorm")
SCALES = ("residual_multiplier", "residual_scale", "resid_scale")


def family_by_structure(core: nn.Module, model_type: str) -> Family:
    """The row that fits a model; ValueError saying what was looked for and found, and what to do."""
    lists = [
        (name, module)
        for name, module in core.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _ffn(module[0]) is not None
    ]
    if len(lists) != 1:
        found = f"{len(lists)} such lists" if lists else "no such list"
        raise _unknown(core, model_type, "one list of decoder layers, each with an FFN of linear projections", found)
    path, layers = lists[0]
    layer = layers[0]
    ffn = _ffn(layer)
    assert ffn is not None
    entry, gate, up, down, fused = ffn
    attentions = [
        f"{name}.{output}"
        for name, child in layer.named_children()
        if "att" in name.lower() and "norm" not in name.lower() and "layernorm" not in type(child).__name__.lower()
        for output in OUTPUTS
        if hasattr(child, output)
    ]
    if len(attentions) != 1:
        found = ", ".join(attentions) or "none among " + ", ".join(name for name, _ in layer.named_children())
        raise _unknown(core, model_type, f"one attention with an output projection ({', '.join(OUTPUTS)})", found)
    norms = [name for name in NORMS if hasattr(layer, name)]
    after = [name for name in AFTER if hasattr(layer, name)]
    if not norms or (after and norms[0] != NORMS[0]):
        # a norm behind the FFN without one named before it: whether anything comes before cannot be seen from outside
        raise _unknown(core, model_type, f"the norm before the FFN ({', '.join(NORMS)})", f"{norms + after}")
    scales = [name for name in SCALES if isinstance(getattr(layer, name, None), (int, float))]
    return Family(
        layers=path,
        entry=entry,
        gate=f"{entry}.{gate}" if gate else "",
        up=f"{entry}.{up}",
        down=f"{entry}.{down}",
        fused=fused,
        norm=norms[0],
        contribution=after[0] if after else "",
        scale=scales[0] if scales else "",
        attention_output=attentions[0],
    )


def _ffn(layer: nn.Module) -> tuple[str, str, str, str, bool] | None:
    """(entry, gate, up, down, fused) of the one child of a layer that looks like an FFN."""
    found: list[tuple[str, str, str, str, bool]] = []
    for name, child in layer.named_children():
        if "att" in name.lower():
            continue
        for gate, up, down in GATED:
            if _linear(child, gate, up, down):
                found.append((name, gate, up, down, False))
                break
        else:
            for up, down in FUSED:
                if _linear(child, up, down):
                    found.append((name, "", up, down, True))
            for up, down in PLAIN:
                if _linear(child, up, down):
                    found.append((name, "", up, down, False))
    return found[0] if len(found) == 1 else None


def _linear(module: nn.Module, *names: str) -> bool:
    return all(_has_weight(getattr(module, name, None)) for name in names)


def _has_weight(module: Any) -> bool:
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return isinstance(module, nn.Module) and weight is not None and weight.dim() == 2


def _unknown(core: nn.Module, model_type: str, looked_for: str, found: str) -> ValueError:
    return ValueError(
        f"the family {model_type!r} of {type(core).__name__} has no row and was not recognised: "
        f"looked for {looked_for}, found {found}; add a row with dartprune.register_family({model_type!r}, Family(...))"
    )
