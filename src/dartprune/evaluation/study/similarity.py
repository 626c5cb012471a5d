"""Similarity of texts by a local encoder: whole texts, greedy matching of tokens, coverage of sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dartprune.errors import UserError

COVERED = 0.7  # cosine from which a sentence counts as said


class Encoder:
    """A sentence encoder from a local folder; tokens are its last hidden states, texts their mean."""

    def __init__(self, folder: Path) -> None:
        """Load.

        Raises:
            ValueError: no folder of an encoder.
        """
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--similarity {folder}: holds no encoder; give the local folder of one, such as a "
                "sentence-transformers model, or leave the option out"
            )
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--similarity {folder}: cannot be loaded ({str(error).splitlines()[0]})") from error
        self._longest = min(
            self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 512)
        )

    def tokens(self, text: str) -> Tensor:
        """Unit vectors of a text's tokens, without the special ones: float32 [T, H]; longer texts are cut."""
        made = self._tokenizer(
            text, return_tensors="pt", truncation=True, max_length=self._longest, return_special_tokens_mask=True
        )
        special = made.pop("special_tokens_mask")[0].bool()
        with torch.no_grad():
            hidden = self._model(**made).last_hidden_state[0].float()
        # a text of special tokens alone keeps them
        return torch.nn.functional.normalize(hidden if bool(special.all()) else hidden[~special], dim=-1)

    def mean(self, text: str) -> Tensor:
        """Unit vector of a text, float32 [H]."""
        return torch.nn.functional.normalize(self.tokens(text).mean(0), dim=-1)


def sentences(text: str) -> list[str]:
    """The sentences of a text; the whole of it where no sentence ends."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()] or [text]


def greedy_match(candidate: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """Precision, recall and F of unit vectors [T, H], each matched with the nearest of the other text (BERTScore)."""
    cosines = candidate @ reference.T
    precision, recall = float(cosines.max(1).values.mean()), float(cosines.max(0).values.mean())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total > 0 else 0.0


def similarity(encoder: Encoder, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means over texts: cosine of whole texts, F of the greedy matching, share of the reference's sentences covered."""
    rows: list[tuple[float, float, float]] = []
    for text, reference in zip(texts, references, strict=True):
        said = torch.stack([encoder.mean(part) for part in sentences(text)])
        wanted = torch.stack([encoder.mean(part) for part in sentences(reference)])
        covered = ((wanted @ said.T).max(1).values >= COVERED).float().mean()
        f = greedy_match(encoder.tokens(text), encoder.tokens(reference))[2]
        rows.append((float(encoder.mean(text) @ encoder.mean(reference)), f, float(covered)))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return dict(zip(("document_cosine", "match_f", "coverage"), means, strict=True))
