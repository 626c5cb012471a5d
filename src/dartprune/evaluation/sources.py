"""Texts and summaries for evaluation: local files, or data sets by name through `datasets`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dartprune.names import unknown
from dartprune.texts import read_texts


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


def require(module: str, what: str) -> None:
    """ValueError if a package of the extra `eval` is missing."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} needs the package {module}: pip install 'dartprune[eval]'")


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


def summaries(name: str) -> list[tuple[str, str]]:
    """Documents and their summaries: of a data set in `SUMMARIES`, or of a local file of JSON lines.

    Raises:
        ValueError: neither, a line without `document` and `summary`, or a data set that cannot be loaded.
    """
    if name in SUMMARIES:
        document, summary = SUMMARIES[name].fields
        return [(row[document], row[summary]) for row in _rows(name, SUMMARIES[name])]
    _check_local(name, "summaries", list(SUMMARIES))
    found = []
    path = Path(name)
    if path.suffix != ".jsonl":
        raise ValueError(f"{name}: summaries are read from JSON lines, a file that ends in .jsonl")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("document", "summary")):
            raise ValueError(f"{name}, line {number}: needs the fields 'document' and 'summary'")
        found.append((row["document"], row["summary"]))
    if not found:
        raise ValueError(f"{name}: holds no line")
    return found


def _check_local(name: str, what: str, known: list[str]) -> None:
    if Path(name).exists():
        return
    if any(mark in name for mark in ("/", "\\", ".")):
        raise ValueError(f"{name}: there is no such file or folder")
    raise unknown(f"source of {what}", name, known)


def _rows(name: str, source: Source) -> Any:
    require("datasets", f"{name} by name")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of each of its attempts
    try:
        return load_dataset(
            source.path,
            source.name,
            split=source.split,
            data_files=None if source.files is None else {source.split: source.files},
            revision=source.revision,
        )
    except (OSError, DatasetsError, HTTPError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {why(error)}; connect, or give a local file") from error


def why(error: BaseException) -> str:
    """Why a data set could not be loaded, on one line."""
    import textwrap

    said = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
    return f"the data set cannot be loaded ({said})"
