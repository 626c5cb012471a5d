"""Texts for evaluation and study: read by domain, cut into token streams that keep or change their topic."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dartprune.errors import UserError, user_file

SEPARATOR = "<|doc|>"  # a line of its own between the documents of a file
_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")


@dataclass(frozen=True)
class Stream:
    """One token sequence. domains: one, or two in order.  change: position of the second domain's first token."""

    tokens: tuple[int, ...]
    domains: tuple[str, ...]
    change: int | None

    @property
    def name(self) -> str:
        """Its domains, for people."""
        return " > ".join(self.domains)


def read_texts(sources: Sequence[str | Path], *, split: str | None = None) -> dict[str, list[str]]:
    """The documents of each domain.

    Args:
        sources: files (.txt or .jsonl, also with .xz) or folders of such. A file's name up to its first dot is its
            domain. Documents of a text file are separated by a line `<|doc|>`; lines of JSON have a field `text`, and
            may name their `domain`.
        split: in folders, only files named `DOMAIN.SPLIT.*`.

    Raises:
        ValueError: nothing there, an unknown kind of file, a line without text.
    """
    documents: dict[str, list[str]] = {}
    for path in _files(sources, split):
        for domain, text in _documents(path):
            if text.strip():
                documents.setdefault(domain, []).append(text.strip())
    if not documents:
        raise UserError(f"no text in {', '.join(map(str, sources)) or 'nothing'}: give files or folders of .txt files")
    return documents


def _files(sources: Sequence[str | Path], split: str | None) -> list[Path]:
    files: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = [p for p in sorted(source.iterdir()) if p.name.endswith(_SUFFIXES)]
            if split is not None:
                inside = [p for p in inside if split in p.name.split(".")[1:]]
            if not inside:
                wanted = "" if split is None else f" of the split {split!r}"
                raise UserError(f"{source}: the folder holds no .txt or .jsonl files{wanted}")
            files += inside
        elif not source.is_file():
            raise UserError(f"{source}: there is no such file or folder")
        elif not source.name.endswith(_SUFFIXES):
            raise UserError(f"{source}: the name must end in one of {', '.join(_SUFFIXES)}")
        else:
            files.append(source)
    return files


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    domain = path.name.split(".")[0]
    try:
        with user_file(path):
            raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    if ".jsonl" not in path.suffixes:
        # split at whole lines only: the mark may stand inside a text that is about it
        yield from ((domain, part) for part in ("\n" + text + "\n").split(f"\n{SEPARATOR}\n"))
        return
    for row in json_lines(text, path, "text"):
        yield str(row.get("domain", domain)), row["text"]


def json_lines(text: str, path: str | Path, *fields: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines; ValueError naming the line for one that is none, or lacks a field of text."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in fields):
            named = "text under " + " and ".join(map(repr, fields)) if fields else "an object"
            raise UserError(f"{path}, line {number}: needs {named}")
        yield row


# tokens after a join that are not compared: a text that is cut in begins in mid-sentence, and so long the mean loss of
# SmolLM2 and of Gemma 3 is more than twice what it settles to (16, 9, 8, 8, 6.5 nats for 3.2)
JOIN = 5


def chat_text(tokenizer: Any, instruction: str) -> str:
    """An instruction in the model's chat template, up to where the answer begins; ValueError where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("this model's tokenizer has no chat template: it is no chat model that could be asked")
    message = [{"role": "user", "content": instruction}]
    text: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return text


def chat_prompt(tokenizer: Any, instruction: str) -> Any:
    """An instruction in the model's chat template, as tensors; ValueError where there is no template."""
    # the template brings the special tokens itself
    text = chat_text(tokenizer, instruction)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)


def opening(tokenizer: Any) -> list[int]:
    """The token that a tokenizer itself puts before a text, none for most: without it such models are lost (Gemma).

    Every window that is cut out of a text needs it at its head, and it is never scored.
    """
    first = tokenizer.bos_token_id
    with_it, without = (tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"] for added in (True, False))
    return [first] if first is not None and list(with_it[:1]) == [first] and list(without[:1]) != [first] else []


def headed(tokens: Sequence[int], head: Sequence[int], most: int) -> list[int]:
    """The last tokens of a text, at most so many, with `head` before them, which counts."""
    body = list(tokens)
    if head and body[: len(head)] == list(head):
        body = body[len(head) :]
    room = max(0, most - len(head))
    return [*head, *body[len(body) - min(room, len(body)) :]][:most]


def pieces(documents: Mapping[str, Sequence[str]], tokenizer: Any, length: int) -> dict[str, list[list[int]]]:
    """Token sequences of at least `length` tokens, of each domain that has one; short documents are joined.

    Raises:
        ValueError: no domain has that much text.
    """
    out: dict[str, list[list[int]]] = {}
    for domain, texts in documents.items():
        current: list[int] = []
        for text in texts:
            current += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(current) >= length:
                out.setdefault(domain, []).append(current)
                current = []
    if not out:
        raise UserError(f"no domain has a text of {length} tokens: give longer texts or ask for shorter streams")
    return out


def streams(
    tokens: Mapping[str, Sequence[Sequence[int]]],
    lengths: Sequence[int],
    count: int,
    *,
    seed: int = 0,
    separator: int | None = None,
) -> list[Stream]:
    """Draw token streams: the same streams for the same arguments.

    Args:
        tokens: of each domain, sequences of at least `max(lengths)` tokens (see `pieces`).
        lengths: tokens of each stretch, one (a single topic) or two (a change of topic; each ordered pair in turn).
        count: how many streams.
        seed: of the draw.
        separator: token that begins each stretch and counts in its length; None: no such token.

    Raises:
        ValueError: lengths that make no stream, too few domains, a text shorter than a stretch.
    """
    if len(lengths) not in (1, 2) or any(length < 2 for length in lengths):
        raise UserError(f"lengths must be one or two numbers of at least 2, got {list(lengths)}")
    if len(tokens) < len(lengths):
        raise UserError(f"a change of topic needs two domains, the texts have {len(tokens)}: {', '.join(tokens)}")
    generator = torch.Generator().manual_seed(seed)
    orders = list(permutations(tokens, len(lengths)))
    order = torch.randperm(len(orders), generator=generator).tolist()
    out: list[Stream] = []
    for i in range(count):
        domains = orders[order[i % len(orders)]]
        row: list[int] = []
        for domain, length in zip(domains, lengths, strict=True):
            texts = tokens[domain]
            text = texts[int(torch.randint(len(texts), (), generator=generator))]
            head = [] if separator is None else [separator]
            needed = length - len(head)
            if len(text) < needed:
                raise UserError(f"a text of {domain} has {len(text)} tokens, a stretch needs {needed}")
            start = int(torch.randint(len(text) - needed + 1, (), generator=generator))
            row += [*head, *text[start : start + needed]]
        out.append(Stream(tuple(row), tuple(domains), lengths[0] if len(lengths) == 2 else None))
    return out


def batch(drawn: Sequence[Stream]) -> Tensor:
    """Streams of equal length as int64 [B, T]; ValueError if they differ in length."""
    sizes = {len(stream.tokens) for stream in drawn}
    if len(sizes) != 1:
        raise UserError(f"streams of one batch must have one length, got {sorted(sizes)}")
    return torch.tensor([stream.tokens for stream in drawn])
