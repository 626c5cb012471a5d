"""Loss of every preset on texts that change domain midway, decoded teacher-forced with the masks in force.

    python benchmarks/quality.py --texts DIR --model PATH --out benchmarks/results/NAME.json

DIR holds one NAME.valid.txt or NAME.valid.txt.xz per domain, documents separated by a line `<|doc|>`. A stream is 64
tokens of prompt and 64 more of one domain, then 128 of another (the demo model was trained on 256 tokens at a
time). The prompt is dense for every arm and is not scored.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
from datetime import date
from itertools import permutations
from pathlib import Path

import torch

from dartprune import Clock, Dart, Dense, Griffin, Random, Relearn, Static
from dartprune.forced import forced_losses
from dartprune.loading import load

PROMPT, HALF = 64, 128


def domains(folder: Path, tokenizer, length: int) -> dict[str, list[list[int]]]:
    """Documents of at least `length` tokens, of each domain."""
    out = {}
    for path in sorted(folder.glob("*.valid.txt*")):
        text = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text()
        documents = [tokenizer(part.strip(), add_special_tokens=False)["input_ids"] for part in text.split("<|doc|>")]
        # short documents of one domain are joined
        joined, current = [], []
        for document in documents:
            current = current + document
            if len(current) >= length:
                joined.append(current)
                current = []
        if joined:
            out[path.name.split(".")[0]] = joined
    return out


def streams(texts: dict[str, list[list[int]]], count: int, seed: int, separator: int) -> torch.Tensor:
    """`count` token streams: a separator and 127 tokens of one domain, the same of another; every pair in turn."""
    generator = torch.Generator().manual_seed(seed)
    pairs = list(permutations(texts, 2))
    rows = []
    for i in range(count):
        row = []
        for name in pairs[i * 7 % len(pairs)]:  # neighbours in the list share a domain
            document = texts[name][int(torch.randint(len(texts[name]), (), generator=generator))]
            start = int(torch.randint(len(document) - HALF + 2, (), generator=generator))
            row += [separator, *document[start : start + HALF - 1]]
        rows.append(row)
    return torch.tensor(rows)


def main() -> None:
    """Run every arm and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--streams", type=int, default=30)
    parser.add_argument("--sparsities", default="0.5,0.7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    model = model.float()  # the weights as they are, no rounding in between
    tokens = streams(domains(args.texts, tokenizer, 2 * HALF), args.streams, args.seed, tokenizer.bos_token_id)
    rows = []
    dense = None
    arms = [(Dense(), 0.0)]
    for s in (float(part) for part in args.sparsities.split(",")):
        arms += [(make(sparsity=s), s) for make in (Static, Griffin, Random, Clock, Dart)]
        arms.append((Dart(sparsity=s, refresh=Relearn()), s))
    for pruner, sparsity in arms:
        losses, report = forced_losses(model, pruner, tokens, PROMPT)
        before, after = losses[:, : HALF - PROMPT], losses[:, HALF - PROMPT :]
        if dense is None:
            dense = losses
        name = pruner.name + ("-relearn" if isinstance(pruner.refresh, Relearn) else "")
        rows.append(
            {
                "arm": name,
                "target": sparsity,
                "realised_sparsity": round(report.realised_sparsity, 4),
                "ppl_before": round(math.exp(before.mean()), 2),
                "ppl_after": round(math.exp(after.mean()), 2),
                "loss_over_dense_before": round(float((before - dense[:, : HALF - PROMPT]).mean()), 4),
                "loss_over_dense_after": round(float((after - dense[:, HALF - PROMPT :]).mean()), 4),
                "events_per_stream_before": sum(e.decoded <= HALF - PROMPT for e in report.events) / len(tokens),
                "events_per_stream_after": sum(e.decoded > HALF - PROMPT for e in report.events) / len(tokens),
            }
        )
        print(rows[-1], flush=True)
    if args.out:
        data = {
            "date": str(date.today()),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "model": Path(args.model).name if args.model else "demo",
            "rows": rows,
        }
        args.out.write_text(json.dumps(data | {"streams": args.streams, "seed": args.seed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
