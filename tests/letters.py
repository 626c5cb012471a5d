"""A tiny model with a tokenizer of letters, and texts of three domains for it."""

from __future__ import annotations

import torch

from tiny import FAMILIES


class Letters:
    """A token for each letter; 1 begins a text."""

    bos_token_id, eos_token_id = 1, None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(letter) % 128 for letter in text]}


def tiny():
    return FAMILIES["llama"]()


def documents(length=400):
    """Three domains, each with letters of its own."""
    generator = torch.Generator().manual_seed(5)
    out = {}
    for name, first in (("low", 2), ("middle", 40), ("high", 80)):
        drawn = torch.randint(first, first + 40, (2, length), generator=generator)
        out[name] = ["".join(chr(int(i)) for i in row) for row in drawn]
    return out
