"""Texts and summaries for evaluation: local files, or data sets by name through `datasets`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dartprune.errors import UserError, read_user_text, require
from dartprune.evaluation.texts import json_lines, read_texts
from dartprune.names import unknown

SECONDS = 10.0  # that the hub has for an answer
DOCUMENTS = 2000  # rows of a data set that may be large


@dataclass(frozen=True)
class Source:
    """Where a data set lies on the Hugging Face hub. fields: the text; or the document and its summary."""

    path: str
    name: str | None
    split: str
    fields: tuple[str, ...]
    files: str | None = None
    revision: str | None = None
    written: int = 128  # tokens that a summary may have


CORPORA = {
    "wikitext-2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", "test", ("text",)),
    # one file of the validation part: about 45,000 documents, far more than anyone reads
    "c4": Source("allenai/c4", None, "validation", ("text",), files="en/c4-validation.00000-of-00008.json.gz"),
}
# repositories that still hold a loading script are read from the hub's conversion or from a copy as parquet files
SUMMARIES = {
    "cnn_dailymail": Source("abisee/cnn_dailymail", "3.0.0", "test", ("article", "highlights")),
    "multi_news": Source("Awesome075/multi_news_parquet", None, "test", ("document", "summary"), written=256),
    "gov_report": Source("ccdv/govreport-summarization", "document", "test", ("report", "summary"), written=512),
    "xsum": Source(
        "EdinburghNLP/xsum", None, "test", ("document", "summary"), revision="refs/convert/parquet", written=64
    ),
}


def corpus(name: str) -> dict[str, list[str]]:
    """Documents of each domain: of a data set in `CORPORA`, or of a local file or folder.

    Raises:
        ValueError: neither, a file that cannot be read, or a data set that cannot be loaded.
    """
    if name not in CORPORA:
        _check_local(name, "text", list(CORPORA))
        return read_texts([name])
    rows = _rows(name, CORPORA[name])
    texts = [row[CORPORA[name].fields[0]] for row in rows]
    if name == "wikitext-2":
        return {name: ["\n\n".join(texts)]}  # its rows are lines
    return {name: texts}


def named_texts(name: str, *, split: str, field: str = "text", documents: int = DOCUMENTS) -> list[str]:
    """The texts of any data set; rows without text are left out.

    Args:
        name: on the Hugging Face hub or a local folder, with `:CONFIG` where the data set has several.
        split: such as `test`.
        field: of each row, that holds the text.
        documents: rows to read at most; the rest is not downloaded.

    Raises:
        ValueError: the extra is not installed, the hub cannot be reached, or there is no such data set, split or field.
    """
    path, _, config = name.partition(":")
    rows = _rows(name, Source(path, config or None, split, (field,)), documents)
    if not rows or not isinstance(rows[0].get(field), str):
        has = ", ".join(rows[0]) if rows else "no rows"
        raise UserError(f"{name}: no text in a field {field!r}; it has {has}")
    return [row[field] for row in rows if row[field].strip()]


def summaries(name: str) -> list[tuple[str, str]]:
    """Documents and their summaries: of a data set in `SUMMARIES`, or of a local file of JSON lines.

    Raises:
        ValueError: neither, a line without `document` and `summary`, or a data set that cannot be loaded.
    """
    if name in SUMMARIES:
        document, summary = SUMMARIES[name].fields
        return [(row[document], row[summary]) for row in _rows(name, SUMMARIES[name])]
    _check_local(name, "summaries", list(SUMMARIES))
    path = Path(name)
    if path.suffix != ".jsonl":
        raise UserError(f"{name}: summaries are read from JSON lines, a file that ends in .jsonl")
    rows = json_lines(read_user_text(path), name, "document", "summary")
    pairs = [(row["document"], row["summary"]) for row in rows]
    if not pairs:
        raise UserError(f"{name}: holds no line")
    return pairs


def _check_local(name: str, what: str, known: list[str]) -> None:
    if Path(name).exists():
        return
    if any(mark in name for mark in ("/", "\\", ".")):
        raise UserError(f"{name}: there is no such file or folder")
    raise unknown(f"source of {what}", name, known)


def _rows(name: str, source: Source, most: int | None = None) -> Any:
    """The rows of a data set; with `most` no more of them than that, and no more is downloaded."""
    require("datasets", f"{name} by name")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of each of its attempts
    streaming = most is not None and not constants.HF_HUB_OFFLINE  # offline, what was cached before can still be read
    if streaming and not Path(source.path).is_dir():
        _ask(source.path)
    try:
        rows = load_dataset(
            source.path,
            source.name,
            split=source.split,
            data_files=None if source.files is None else {source.split: source.files},
            revision=source.revision,
            streaming=streaming,
        )
        return rows if most is None else list(islice(iter(rows), most))
    except (OSError, DatasetsError, HTTPError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{name}: {why(error)}; connect, or give a local file") from error


def _ask(name: str) -> None:
    """Whether the hub knows the data set, asked once: `datasets` itself repeats a failing request for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"there is no data set {name!r} on the Hugging Face hub: check the spelling") from error
    except (HTTPError, OSError) as error:
        raise UserError(f"{name}: the Hugging Face hub cannot be reached; connect, or give a local file") from error


def why(error: BaseException) -> str:
    """Why a data set could not be loaded, on one line."""
    import textwrap

    said = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
    return f"the data set cannot be loaded ({said})"
