"""GGUF files: how many bits their FFNs have, and the packed rows that are made of them once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dartprune.cache import cache_folder
from dartprune.errors import UserError, require

GGUF = ".gguf"
FEW_BITS = 5.25  # of an FFN weight, scales counted: up to these rows of 4 bits are made of a file, of others 8
WHOLE_BITS = 16.0  # from these on its weights are not quantised
_CHOICE, _SOURCE = "choice.json", "source.json"

_log = logging.getLogger("dartprune")
Unpacked = Callable[[], tuple[Any, Any]]  # the file's model and tokenizer, unpacked


def ffn_bits(path: str | Path) -> float:
    """Bits of an FFN weight in a GGUF file, scales counted; ValueError where it has no FFN, or cannot be read."""
    require("gguf", f"reading {str(path)!r}", "gguf")
    from gguf import GGUFReader

    try:
        tensors = [t for t in GGUFReader(path).tensors if "ffn_" in t.name and len(t.shape) == 2]
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"no model could be loaded from {str(path)!r}: {error}") from error
    if not tensors:
        raise UserError(f"{path}: no tensor is named as an FFN's is")
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def kept_rows(path: str | Path, bits: int | None, unpacked: Unpacked) -> Path | tuple[Any, Any] | None:
    """A GGUF file's model in rows of 4 or 8 bits: made once, then kept in the cache, from where it is mapped.

    Args:
        path: of the file.
        bits: 4 or 8, or None: as the file's own FFN has it.
        unpacked: loads the file.

    Returns:
        The folder, for `packed_file.load_packed`. Where nothing can be kept, the model and tokenizer that were made.
        None where bits is None and the file has no FFN whose bits could be told, or one that is not quantised.

    Raises:
        ValueError: the file cannot be read; with bits, also that its FFN cannot be in rows.
    """
    from dartprune.packed_file import FORMAT

    path = Path(path).resolve()
    place = cache_folder() / "packed" / f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    facts = path.stat()
    source = {"size": facts.st_size, "modified": facts.st_mtime_ns, "format": FORMAT}
    asked = bits
    if bits is None:
        choice = _read(place / _CHOICE)
        if {key: choice.get(key) for key in source} != source:
            try:
                own = ffn_bits(path)
            except UserError:
                return None  # of experts, say; and what is wrong with the file is said by whoever unpacks it
            choice = source | {"ffn_bits": own, "bits": 4 if own <= FEW_BITS else 8 if own < WHOLE_BITS else None}
            _write(place / _CHOICE, choice)
        bits = choice["bits"]
    if bits is None:
        return None
    folder = place / f"int{bits}"
    if _read(folder / _SOURCE) == source:
        return folder
    return _make(path, folder, bits, source, unpacked, must=asked is not None)


def _make(
    path: Path, folder: Path, bits: int, source: dict[str, int], unpacked: Unpacked, *, must: bool
) -> Path | tuple[Any, Any] | None:
    from dartprune.packed_file import save_packed
    from dartprune.quantisation import quantise

    _log.warning(
        "packing %s into rows of %d bits, once: this takes a minute or two, and they are kept in %s "
        "(dtype bfloat16 unpacks the file instead)",
        *(path.name, bits, folder),
    )
    model, tokenizer = unpacked()
    try:
        quantise(model, bits)
    except UserError as error:
        if must:
            raise
        _log.warning("%s is unpacked to bfloat16: %s", path.name, error)
        return model, tokenizer
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # made beside its place and then moved: another process may be doing the same, and this one may be stopped
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            new = Path(made) / folder.name
            save_packed(model, new)
            tokenizer.save_pretrained(new)
            (new / _SOURCE).write_text(json.dumps(source), encoding="utf-8")
            if _read(folder / _SOURCE) != source:
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
    except (OSError, UserError) as error:
        _log.warning("the rows of %s are not kept: %s (DARTPRUNE_CACHE names another folder)", path.name, error)
        return model, tokenizer
    return folder


def _read(path: Path) -> dict[str, Any]:
    """A small file of the cache; empty where it is not there, or not what was written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
    except OSError as error:
        _log.warning("%s cannot be written: %s (DARTPRUNE_CACHE names another folder)", path, error)
