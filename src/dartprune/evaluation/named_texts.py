"""Texts from a data set by its name, through `datasets`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

SECONDS = 10.0
DOCUMENTS = 2000  # rows read at most


def named_texts(name: str, *, split: str, field: str = "text", documents: int = DOCUMENTS) -> list[str]:
    """The texts of a data set.

    Args:
        name: on the Hugging Face hub or a local folder, with `:CONFIG` where the data set has several.
        split: such as `test`.
        field: of each row, that holds the text.
        documents: rows to read at most; the rest is not downloaded.

    Raises:
        ValueError: the extra is not installed, the hub cannot be reached, or there is no such data set, split or field.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f'the data set {name!r} is read through `datasets`, which is not installed: pip install "dartprune[eval]", '
            "or give files"
        ) from None
    from huggingface_hub import constants

    source, _, config = name.partition(":")
    local = Path(source).is_dir() or constants.HF_HUB_OFFLINE  # offline, what was cached before can still be read
    if not local:
        _ask(source)
    options: dict[str, Any] = {"split": split, "streaming": not constants.HF_HUB_OFFLINE}
    try:
        rows = list(islice(iter(datasets.load_dataset(source, config or None, **options)), documents))
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0][:300]
        raise ValueError(f"data set {name!r}, split {split!r}: cannot be read ({reason})") from error
    if not rows or not isinstance(rows[0].get(field), str):
        has = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"data set {name!r}: no text in a field {field!r}; it has {has}")
    return [row[field] for row in rows if row[field].strip()]


def _ask(name: str) -> None:
    """Whether the hub knows the data set, asked once: `datasets` itself repeats a failing request for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"there is no data set {name!r} on the Hugging Face hub: check the spelling") from error
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"data set {name!r}: the Hugging Face hub cannot be reached; connect, or give files or folders of text"
        ) from error
