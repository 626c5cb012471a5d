"""Models to measure: named real shapes with random weights, or a model from disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.bench.device import device_of, free_bytes
from dartprune.errors import UserError
from dartprune.model.context import context_length
from dartprune.model.sizes import dtype_name
from dartprune.names import Registry, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROOM = 1.15  # of the weights' bytes: one weight is copied while it is laid out, and caches come on top
_BLOCK = 4_194_301  # random values drawn once; a prime, so that rows do not repeat in step with any width


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

# the configurations that these models are published with, as far as they decide sizes and arithmetic
shapes: Registry[dict[str, Any]] = Registry("shape")
shapes.register(
    "llama-3.2-1b",
    _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": _llama3(32.0),
    },
)
shapes.register(
    "llama-3.2-3b",
    _LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_parameters": _llama3(32.0),
    },
)
shapes.register(
    "llama-3.1-8b",
    _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": _llama3(8.0),
    },
)
shapes.register(
    "qwen3-0.6b",
    {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
)
shapes.register(
    "gpt2",
    {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
)


@dataclass(frozen=True)
class Subject:
    """A model to measure, what to call it, and what must be said of it."""

    model: Any
    name: str
    dtype: str
    layers: int
    all_layers: int
    notes: list[str]

    def settings(self, backend: str, turns: int) -> dict[str, Any]:
        """What a result says of the model and of how it was measured."""
        what = {"subject": self.name, "dtype": self.dtype, "layers": self.layers}
        return what | {"backend": backend, "turns": turns}


def dtype_of(name: str) -> torch.dtype:
    """The float type of that name; ValueError naming the nearest for another."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def config_of(shape: str, layers: int | None = None) -> Any:
    """The configuration of a named shape, with fewer layers if asked; ValueError for an unknown name or too many."""
    from transformers import AutoConfig

    settings = dict(shapes.get(shape))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    whole = int(config.num_hidden_layers)
    if layers is not None:
        if not 1 <= layers <= whole:
            raise UserError(f"{shape} has {whole} layers: --layers must lie between 1 and {whole}, got {layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def build(shape: str, *, dtype: str = "bfloat16", layers: int | None = None, device: str | None = None) -> Subject:
    """A model of a named shape with random weights, allocated in its dtype.

    Args:
        shape: a name from `shapes`.
        dtype: float32, bfloat16 or float16.
        layers: how many of its layers, None for all.
        device: where to put it.

    Raises:
        ValueError: unknown shape or dtype, or not enough memory for it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config, kind, place = config_of(shape, layers), dtype_of(dtype), device_of(device)
    whole = int(config_of(shape).num_hidden_layers)
    with torch.device("meta"):
        blueprint = AutoModelForCausalLM.from_config(config, dtype=kind)
    check_room(f"{shape} in {dtype}", sum(p.numel() for p in blueprint.parameters()) * kind.itemsize, place)
    # drawing every weight by itself takes longer than all measurements
    with no_init_weights(), place:
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
    _randomise(model)
    count = int(config.num_hidden_layers)
    notes = [] if count == whole else [f"{count} of the {whole} layers of {shape}: ratios of one layer stay comparable"]
    return Subject(model.eval(), shape, dtype, count, whole, notes)


def subject(
    *,
    model: str | None,
    shape: str | None,
    dtype: str = "auto",
    layers: int | None = None,
    device: str | None = None,
) -> Subject:
    """The model to measure: a named shape, or one from disk or hub (None: the small one inside the package)."""
    if shape is not None:
        if model is not None:
            raise UserError("give either --model or --shape, not both")
        return build(shape, dtype="bfloat16" if dtype == "auto" else dtype, layers=layers, device=device)
    if layers is not None:
        raise UserError("--layers goes with --shape: a loaded model has the layers it has")
    from dartprune.loading import load

    place = device_of(device)
    loaded, _ = load(model, dtype=dtype, device=str(place))
    count = int(loaded.config.get_text_config().num_hidden_layers)
    return Subject(loaded, model or "demo", dtype_name(loaded), count, count, [])


def check_room(what: str, needed: int, device: torch.device) -> None:
    """ValueError, before anything is allocated, if so many bytes of weights do not fit."""
    free = free_bytes(device)
    if free is not None and ROOM * needed > free:
        raise UserError(
            f"{what} needs {ROOM * needed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free: "
            "take fewer --layers or a smaller shape"
        )


@torch.no_grad()
def fill(tensors: Iterable[Tensor], deviation: float) -> None:
    """Fill contiguous tensors with normal values: one block of random values again and again, which is quick."""
    block: Tensor | None = None
    start = 0  # in the block, where the last tensor ended
    for tensor in tensors:
        if block is None or block.dtype != tensor.dtype or block.device != tensor.device:
            generator = torch.Generator().manual_seed(0)
            block = (torch.randn(_BLOCK, generator=generator) * deviation).to(tensor.device, tensor.dtype)
        flat = tensor.view(-1)
        done = 0
        while done < flat.numel():
            part = flat[done : done + _BLOCK - start]
            part.copy_(block[start : start + part.numel()])
            done, start = done + part.numel(), (start + part.numel()) % _BLOCK


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Random matrices, norms that leave their input as it is."""
    fill((p for p in model.parameters() if p.dim() > 1), 0.02)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def prompts(model: Any, batch: int, tokens: int) -> Tensor:
    """Random token ids [batch, tokens], the same at every call; ValueError for more than the context holds."""
    most = context_length(model)
    if most is not None and tokens > most:
        raise UserError(f"{tokens} tokens are more than the model's context of {most}")
    generator = torch.Generator().manual_seed(0)
    high = math.ceil(
        0.99 * int(model.config.get_text_config().vocab_size)
    )  # the last ones are special in many vocabularies
    return torch.randint(5, high, (batch, tokens), generator=generator).to(model.device)
