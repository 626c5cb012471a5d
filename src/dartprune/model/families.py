"""Where each family of decoders keeps its FFN: a table of rows, and the layers that a row finds in a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from dartprune.errors import UserError
from dartprune.model.calls import bare
from dartprune.model.layer import Decoder, Layer, activation_name, check_single, sizes
from dartprune.model.lookup import Family, at, core_of, first_of, refuse_by_kind
from dartprune.model.structure import by_structure

__all__ = ["FAMILIES", "Decoder", "Family", "Layer", "describe", "register_family"]


_LLAMA = Family(
    layers="model.layers",
    entry="mlp",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm="post_attention_layernorm",
    attention_output="self_attn.o_proj",
)
_GEMMA = _LLAMA.but(norm="pre_feedforward_layernorm", contribution="post_feedforward_layernorm")
_DENSE_4H = Family(
    layers="gpt_neox.layers",
    entry="mlp",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="post_attention_layernorm",
    attention_output="attention.dense",
)

# config.model_type -> where everything is; alternatives are separated by `|`, the first that exists is taken
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA.but(scale="residual_multiplier"),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA.but(layers="model.layers|model.language_model.layers"),
    "olmo2": _LLAMA.but(norm="", contribution="post_feedforward_layernorm"),
    "phi3": _LLAMA.but(gate="", up="mlp.gate_up_proj", fused=True),
    "starcoder2": _LLAMA.but(gate="", up="mlp.c_fc", down="mlp.c_proj"),
    "gpt2": Family(
        layers="transformer.h",
        entry="mlp",
        up="mlp.c_fc",
        down="mlp.c_proj",
        norm="ln_2",
        attention_output="attn.c_proj",
    ),
    "gpt_neox": _DENSE_4H,
    "falcon": _DENSE_4H.but(
        layers="transformer.h",
        norm="ln_mlp|post_attention_layernorm|input_layernorm",
        attention_output="self_attention.dense",
    ),
    "opt": Family(
        layers="model.decoder.layers",
        entry="fc1",
        up="fc1",
        down="fc2",
        norm="final_layer_norm",
        norm_if="do_layer_norm_before",
        contribution="fc2",
        attention_output="self_attn.out_proj",
        act="activation_fn",
        inline=True,
    ),
}


def register_family(model_type: str, family: Family) -> None:
    """Add a row for models whose `config.model_type` is `model_type`.

    Raises:
        ValueError: there is a row already.
    """
    if model_type in FAMILIES:
        raise UserError(
            f"family {model_type!r} has a row already: remove it from dartprune.model.families.FAMILIES first"
        )
    FAMILIES[model_type] = family


def describe(model: Any) -> Decoder:
    """Take a model apart.

    Args:
        model: a transformers decoder; shells of torch.compile and PEFT are looked through.

    Raises:
        TypeError: not a model.
        ValueError: a kind of model that has no FFN to prune, or a family that is not recognised.
    """
    core = core_of(model)
    refuse_by_kind(core)
    model_type = str(core.config.get_text_config().model_type)
    row = FAMILIES.get(model_type)
    if row is None:
        return by_structure(core, model_type)
    layers = tuple(_layer(index, bare(module), row) for index, module in enumerate(first_of(core, row.layers)))
    check_single(layers)
    return Decoder(model_type, "table", layers, layers[0].hidden)


def _layer(index: int, module: nn.Module, row: Family) -> Layer:
    entry, up, down = (bare(at(module, path)) for path in (row.entry, row.up, row.down))
    gate = bare(at(module, row.gate)) if row.gate else None
    norm = bare(first_of(module, row.norm)) if row.norm else None
    if row.norm_if and not getattr(module, row.norm_if):
        norm = None
    holder = module if row.inline else entry
    act = bare(getattr(holder, row.act) if row.act else first_of(holder, "act_fn|activation_fn|act|activation"))
    hidden, neurons = _shape(down)
    return Layer(
        index=index,
        entry=entry,
        inline=row.inline,
        gate=gate,
        up=up,
        down=down,
        fused=row.fused,
        activation=activation_name(act),
        act=act,
        norm=norm,
        contribution=bare(at(module, row.contribution)) if row.contribution else entry,
        scale=float(getattr(module, row.scale)) if row.scale else 1.0,
        attention_output=bare(at(module, row.attention_output)),
        hidden=hidden,
        neurons=neurons,
    )


def _shape(down: nn.Module) -> tuple[int, int]:
    """(H, I) of a down projection of any kind."""
    size = sizes(down)
    if size is None:
        raise UserError(f"the down projection is a {type(down).__name__}, whose width cannot be read")
    return size[1], size[0]
