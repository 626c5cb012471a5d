"""A quantised model as a folder: its packed rows are mapped into memory when it is loaded, not read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dartprune
from dartprune.errors import UserError
from dartprune.ffn.row_format import RowFormat
from dartprune.model.packed import Packed
from dartprune.model.packed_bytes import ByteEmbedding, ByteLinear
from dartprune.model.packed_rows import RowEmbedding, RowProjection, bare_rows
from dartprune.model.sizes import dtype_name
from dartprune.run import run_of

NAME = "packed.pt"
FORMAT = 2


def save_packed(model: Any, folder: str | Path) -> None:
    """Write a model that `dartprune.quantise` packed into a folder, from which `dartprune.loading.load` takes it.

    Weights are read, never copied. The tokenizer is not the model's: save it into the same folder.

    Args:
        model: the model.
        folder: made where it is not there.

    Raises:
        ValueError: the model is attached, or the folder cannot be written.
    """
    if run_of(model) is not None:
        raise UserError("the model is attached: call dartprune.detach(model) before saving it")
    tensors: dict[str, Tensor] = {}
    parameters: list[str] = []
    modules: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        own = dict(_tensors(module))
        parameters += [_name(path, name) for name in module._parameters if name in own]
        tensors |= {_name(path, name): tensor.detach() for name, tensor in own.items()}
        if isinstance(module, Packed):
            modules[path] = module.description()
    held = {
        "format": FORMAT,
        "dartprune": dartprune.__version__,
        "dtype": dtype_name(model),
        "modules": modules,
        "parameters": parameters,
        "tensors": tensors,
    }
    folder = Path(folder)
    beside = folder / f"{NAME}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        torch.save(held, beside)
        beside.replace(folder / NAME)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"the model cannot be written to {str(folder)!r}: {error}") from error


def is_packed(folder: str | Path) -> bool:
    """Whether `save_packed` wrote a folder."""
    return (Path(folder) / NAME).is_file()


def kept_dtype(folder: str | Path) -> str:
    """`int4` or `int8`, of a folder that `save_packed` wrote; ValueError where its file is damaged."""
    return str(_read(Path(folder) / NAME)["dtype"])


@torch.no_grad()
def load_packed(folder: str | Path) -> Any:
    """The model of a folder that `save_packed` wrote, in evaluation mode; its weights lie where the file is mapped.

    Raises:
        ValueError: the file is damaged or of another version, or does not fit its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    held = _read(Path(folder) / NAME)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        _fill(model, held)
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{Path(folder) / NAME} does not fit the configuration beside it: {error}") from error
    let_save(model)
    return model.eval()


def let_save(model: Any) -> None:
    """Make `save_pretrained` of a packed model write what `load_packed` reads."""
    from functools import partial

    model.save_pretrained = partial(save_packed, model)


def _read(path: Path) -> dict[str, Any]:
    try:
        held: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what torch raises for a damaged file is of no one kind
        raise UserError(f"{path} cannot be read: it is damaged, or no such file ({type(error).__name__})") from error
    version = held.get("format") if isinstance(held, dict) else None
    if version != FORMAT:
        raise UserError(f"{path} is of format {version!r}, this version of dartprune reads {FORMAT}")
    return dict(held)


def _fill(model: nn.Module, held: dict[str, Any]) -> None:
    """Put packed modules in, and the tensors of all others."""
    # what was one tensor is one again: an FFN's projections hold the same two
    single: dict[tuple[Any, ...], Tensor] = {}
    tensors: dict[str, Tensor] = {
        name: single.setdefault((value.data_ptr(), value.shape, value.dtype), value)
        for name, value in held["tensors"].items()
    }
    for path, description in held["modules"].items():
        parent, _, name = path.rpartition(".")
        own = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
        setattr(model.get_submodule(parent), name, _restored(description, own))
    parameters, packed = set(held["parameters"]), set(held["modules"])
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if path in packed:
            continue
        module = model.get_submodule(path)
        if name in parameters:
            before = module._parameters.get(last)
            if before is None or before.shape != tensor.shape:
                raise UserError(f"{name} is {tuple(tensor.shape)} there")
            module._parameters[last] = made.setdefault(id(tensor), nn.Parameter(tensor, before.requires_grad))
        elif last in module._buffers:
            module._buffers[last] = tensor
        else:
            setattr(module, last, tensor)
    for path, module in model.named_modules():
        for name, tensor in _tensors(module):
            if tensor.is_meta:
                raise UserError(f"{_name(path, name)} is missing there")


def _restored(description: dict[str, Any], tensors: dict[str, Tensor]) -> Packed:
    """The module whose `description` and tensors, by name, were kept."""
    kind, bias = description["kind"], tensors.get("bias")
    if "layout" in description:
        layout, dtype = RowFormat(*description["layout"]), getattr(torch, description["dtype"])
        rows = bare_rows(tensors["head"], tensors["tail"], layout, dtype)
    if kind == "rows":
        module: Packed = RowProjection(rows, description["role"], bias)
    elif kind == "row embedding":
        module = RowEmbedding(rows, description["factor"])
    elif kind == "bytes":
        module = ByteLinear(tensors["weight8"], tensors["scale"], bias)
    elif kind == "embedding":
        module = ByteEmbedding(tensors["weight8"], tensors["scale"], description["factor"])
    else:
        raise ValueError(f"unknown kind of packed module {kind!r}")
    return module


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensors of a module itself, by name."""
    for kept in (module._parameters, module._buffers, module.__dict__):
        yield from ((name, tensor) for name, tensor in kept.items() if isinstance(tensor, Tensor))


def _name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
