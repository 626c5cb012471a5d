"""Assess models on the held-out part of each domain: loss at two lengths, samples.

    python tools/demo_model/assess.py --corpus WORK --model new=RUN/model --model old=FOLDER --out RUN/assessment.json

All models must share the corpus's tokenizer: the losses are per token of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from train import domains, held_out_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTHS = (256, 1024)
PROMPT = 24  # tokens of held-out text that a sample goes on from
SAMPLE = 64  # tokens of a sample


@torch.no_grad()
def losses(model: Any, windows: Tensor, tokens: int = 4096) -> Tensor:
    """Loss in nats of each token but the first of each window: float32 [N, length - 1]."""
    out = []
    for rows in windows.split(max(1, tokens // windows.shape[1])):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        out.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none"))
    return torch.cat(out)


def by_domain(model: Any, corpus: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Of each domain: loss per token at each length, bits per byte at the longest, loss late in the longest windows."""
    out: dict[str, Any] = {}
    for name in domains(corpus):
        row: dict[str, float] = {}
        for length in LENGTHS:
            each = losses(model, held_out_windows(corpus, name, length))
            row[f"loss_{length}"] = float(each.mean())
        size = about["domains"][name]
        row["bits_per_byte"] = row[f"loss_{LENGTHS[-1]}"] / math.log(2) * size["valid_tokens"] / size["valid_bytes"]
        row["loss_late"] = float(each[:, LENGTHS[-1] // 2 :].mean())
        out[name] = row
    return out


def samples(model: Any, tokenizer: Any, corpus: Path, seed: int = 0) -> dict[str, dict[str, str]]:
    """Of each domain: the beginning of a held-out window, and what the model makes of it at temperature 0.8."""
    out = {}
    for name in domains(corpus):
        prompt = held_out_windows(corpus, name, 256)[3:4, :PROMPT]
        torch.manual_seed(seed)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=SAMPLE,
            do_sample=True,
            temperature=0.8,
            top_k=50,
        )
        out[name] = {
            "prompt": tokenizer.decode(prompt[0, 1:]),
            "text": tokenizer.decode(tokens[0, PROMPT:], skip_special_tokens=True),
        }
    return out


def assess(corpus: Path, models: dict[str, Path]) -> dict[str, Any]:
    """Losses and samples of each model.

    Raises:
        ValueError: a model with another tokenizer than the corpus.
    """
    about = json.loads((corpus / "corpus.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    out: dict[str, Any] = {"corpus": about, "models": {}}
    for name, folder in models.items():
        if AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{folder}: the model has another tokenizer than the corpus, losses would not compare")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        out["models"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "domains": by_domain(model, corpus, about),
            "samples": samples(model, tokenizer, corpus),
        }
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, assess, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="give one or more")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    args = parser.parse_args(argv)
    models = {}
    for text in args.model:
        name, found, folder = text.partition("=")
        if not (name and found and Path(folder).is_dir()):
            sys.exit(f"assess.py: --model wants NAME=FOLDER with a folder that exists, got {text!r}")
        models[name] = Path(folder)
    try:
        result = assess(args.corpus, models)
    except ValueError as error:
        sys.exit(f"assess.py: {error}")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, model in result["models"].items():
        for domain, row in model["domains"].items():
            shown = ", ".join(f"{length}: {math.exp(row[f'loss_{length}']):.1f}" for length in LENGTHS)
            print(f"{name} {domain}: perplexity {shown}; {row['bits_per_byte']:.2f} bits per byte")


if __name__ == "__main__":
    main()
