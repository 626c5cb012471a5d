"""The corpus of the demo model: documents cleaned, tokenised and kept as one array of tokens for each domain and split.

    python tools/demo_model/corpus.py --texts FOLDER --out WORK [--tokenizer FOLDER]

A folder holds `DOMAIN.train.txt.xz` and `DOMAIN.valid.txt.xz` (or .txt, .jsonl); a line `<|doc|>` separates documents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dartprune.evaluation.texts import read_texts

END = "<|endoftext|>"  # token 0: begins each text, ends it, and pads
SHORTEST = 40  # characters; shorter documents are headings and debris


def clean(train: Mapping[str, Sequence[str]], valid: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The documents to train on: no short ones, none twice, none that also stands in the held-out part."""
    seen = {_fingerprint(text) for texts in valid.values() for text in texts}
    out: dict[str, list[str]] = {}
    for domain, texts in train.items():
        kept = []
        for text in texts:
            mark = _fingerprint(text)
            if len(text) >= SHORTEST and mark not in seen:
                seen.add(mark)
                kept.append(text)
        if kept:
            out[domain] = kept
    return out


def _fingerprint(text: str) -> bytes:
    # letters alone, so that a copy with other spaces or line ends is still a copy
    return hashlib.sha256("".join(text.split()).lower().encode()).digest()


def learn_tokenizer(documents: Mapping[str, Sequence[str]], vocabulary: int, sample: int = 4_000_000) -> Any:
    """A byte-level BPE tokenizer from at most `sample` characters of each domain: none owns the vocabulary."""

    def texts() -> Iterator[str]:
        for parts in documents.values():
            left = sample
            for text in parts:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token=END, eos_token=END, pad_token=END)


def tokenise(documents: Sequence[str], tokenizer: Any) -> np.ndarray:
    """All documents in a row as uint16, each begun by token 0."""
    out: list[np.ndarray] = []
    for start in range(0, len(documents), 256):
        rows = tokenizer(list(documents[start : start + 256]), add_special_tokens=False, verbose=False)["input_ids"]
        for row in rows:
            out.append(np.array([0, *row], dtype=np.uint16))
    return np.concatenate(out)


def prepare(texts: Sequence[Path], out: Path, tokenizer: Path | None, vocabulary: int) -> dict[str, Any]:
    """Write the tokenizer, `DOMAIN.SPLIT.npy` and `corpus.json` into `out`; the contents of the last are returned."""
    valid = read_texts(texts, split="valid")
    raw = read_texts(texts, split="train")
    train = clean(raw, valid)
    chosen = learn_tokenizer(train, vocabulary) if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    if chosen.eos_token_id != 0 or len(chosen) > 1 << 16:
        raise ValueError(f"{tokenizer}: the end of a text must be token 0 and the vocabulary at most 65,536 tokens")
    out.mkdir(parents=True, exist_ok=True)
    chosen.save_pretrained(out / "tokenizer")
    about: dict[str, Any] = {"vocabulary": len(chosen), "domains": {}}
    for domain, documents in train.items():
        row: dict[str, Any] = {"documents": len(documents), "dropped": len(raw[domain]) - len(documents)}
        for split, parts in (("train", documents), ("valid", valid.get(domain, []))):
            if not parts:
                raise ValueError(f"{domain}: there is no {split} part")
            tokens = tokenise(parts, chosen)
            np.save(out / f"{domain}.{split}.npy", tokens)
            size = sum(len(text.encode()) for text in parts)
            row |= {f"{split}_bytes": size, f"{split}_tokens": len(tokens)}
        about["domains"][domain] = row
    (out / "corpus.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and prepare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="folders or files of texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokens and tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="use the tokenizer of this folder instead of learning one")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of a tokenizer that is learnt")
    args = parser.parse_args(argv)
    try:
        about = prepare(args.texts, args.out, args.tokenizer, args.vocabulary)
    except ValueError as error:
        sys.exit(f"corpus.py: {error}")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
