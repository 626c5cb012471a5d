"""Write the model card and the picture of the training curve from a finished, assessed run.

python tools/demo_model/card.py --run RUN --assessment RUN/assessment.json --machine "2 cores" --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from assess import LENGTHS, SAMPLE
from train import log_rows

SOURCES = {
    "novels": "English novels 1838 to 1930, public domain",
    "medicine": "MedQuAD, CC BY 4.0",
    "code": "Python's standard library (PSF licence) and peft (Apache-2.0)",
    "stories": "TinyStories, lower-cased, CDLA-Sharing-1.0",
    "speeches": "speeches of US presidents, public domain",
    "wiki": "WikiText-2 validation split, CC BY-SA 3.0",
}


def card(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    last: Mapping[str, Any],
    assessment: Mapping[str, Any],
    machine: str,
    note: str = "",
) -> str:
    """The card as Markdown.

    Args:
        config: the model's config.json.
        settings: shape and recipe of the run.
        last: the last row of its log.
        assessment: of assess.py; its first model is the one described, others stand beside it.
        machine: what it was trained on, in words.
        note: what else must be said of the training, whole sentences.
    """
    names = list(assessment["models"])
    mine = assessment["models"][names[0]]
    recipe, shape = settings["recipe"], settings["shape"]
    ffn = 3 * shape["hidden"] * shape["intermediate"] * shape["layers"]
    outside = mine["parameters"] - config["vocab_size"] * shape["hidden"]
    template = Template((Path(__file__).parent / "card.template.md").read_text())
    return template.substitute(
        {**shape, **recipe},
        name=names[0],
        parameters=f"{mine['parameters'] / 1e6:.1f}",
        ffn_share=f"{ffn / outside:.0%}",
        vocabulary=f"{config['vocab_size']:,}",
        long=f"{recipe['long']:,}",
        batch=f"{recipe['batch']:,}",
        context=f"{shape['context']:,}",
        tokens=f"{last['tokens'] / 1e6:.1f}",
        steps=f"{last['step']:,}",
        minutes=f"{last['seconds'] / 60:.0f}",
        machine=machine,
        note=f"\n{note}\n" if note else "",
        long_from=f"{recipe['long_from']:.0%}",
        bare=f"{recipe['bare']:.0%}",
        decay_from=f"{recipe['decay_from']:.0%}",
        sample=SAMPLE,
        perplexities=_perplexities(assessment["models"]),
        samples="\n\n".join(_sample(domain, each) for domain, each in mine["samples"].items()),
    )


def _perplexities(models: Mapping[str, Any]) -> str:
    columns = [(name, length) for name in models for length in LENGTHS]
    mine = next(iter(models.values()))["domains"]
    heads = [f"{name}, {length:,}" for name, length in columns]
    lines = ["| domain | source and licence | " + " | ".join(heads) + " | bits per byte |"]
    lines.append("|---|---|" + "---|" * (len(columns) + 1))
    for domain, row in mine.items():
        figures = [f"{math.exp(models[name]['domains'][domain][f'loss_{length}']):.1f}" for name, length in columns]
        source = SOURCES.get(domain, "given on the command line")
        lines.append(f"| {domain} | {source} | {' | '.join(figures)} | {row['bits_per_byte']:.2f} |")
    return "\n".join(lines)


def _sample(domain: str, sample: Mapping[str, str]) -> str:
    return f"**{domain}**\n\n```text\n{sample['prompt'].strip()} >>>{sample['text'].rstrip()}\n```"


def curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training loss, and the held-out loss of each domain, against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    trained = [row for row in rows if "loss" in row]
    millions = [row["tokens"] / 1e6 for row in trained]
    axes.plot(millions, [row["loss"] for row in trained], color="0.75", lw=1, label="training, all domains")
    tested = [row for row in rows if "valid" in row]
    for domain in tested[-1]["valid"] if tested else ():
        axes.plot([row["tokens"] / 1e6 for row in tested], [row["valid"][domain] for row in tested], label=domain)
    for before, after in pairwise(trained):
        if before["length"] != after["length"]:
            axes.axvline(after["tokens"] / 1e6, color="0.8", lw=1, ls=":")
            axes.annotate(f" {after['length']} tokens", (after["tokens"] / 1e6, 6.3), color="0.5")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token", ylim=(1.5, 7))
    axes.set_title("Held-out loss while training, windows of 256 tokens")
    axes.legend(ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and write MODEL_CARD.md and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the finished run")
    parser.add_argument("--assessment", type=Path, required=True, help="written by assess.py")
    parser.add_argument("--machine", required=True, help="what it was trained on, in words")
    parser.add_argument("--note", default="", help="what else must be said of the training, whole sentences")
    parser.add_argument("--out", type=Path, required=True, help="folder for MODEL_CARD.md and curve.png")
    args = parser.parse_args(argv)
    needed = [args.run / "model" / "config.json", args.run / "settings.json", args.assessment]
    for path in (*needed, args.run / "log.jsonl"):
        if not path.is_file():
            sys.exit(f"card.py: {path} is missing: the run must be finished and assessed first")
    config, settings, assessment = (json.loads(path.read_text()) for path in needed)
    rows = list(log_rows(args.run))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "MODEL_CARD.md").write_text(card(config, settings, rows[-1], assessment, args.machine, args.note))
    curve(rows, args.out / "curve.png")


if __name__ == "__main__":
    main()
