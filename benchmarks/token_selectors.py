"""Token selectors against each other and against the exact choice of each token.

    python benchmarks/token_selectors.py --texts DIR --model PATH --out benchmarks/results/selectors-NAME.json

Two tables. Arms: loss over dense in nats, teacher-forced with the masks in force, at equal target sparsity. Layers: the
sketch's choice against the exact top-k of the same tokens at equal rows: recall, share of the output energy held,
and the loss when this layer alone is selected. The picture of the second lies beside the JSON. DIR holds NAME.SPLIT.txt
files as in `dartprune.evaluation.texts`; with one domain a stream keeps its topic, else it changes it midway.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch

from dartprune import Dart, Dense, DepthAware, GatedDart, PerToken, Sketch, SketchDart, TokenGate, Uniform
from dartprune.evaluation.forced import forced_losses, token_losses
from dartprune.evaluation.texts import batch, pieces, read_texts, streams
from dartprune.ffn.selector_ops import chosen_mask, chosen_rows
from dartprune.ffn.sketch import build_sketch, sketch_scores
from dartprune.loading import load
from dartprune.model.families import describe
from dartprune.model.weights import row_weights
from dartprune.names import comma_list

PROMPT, HALF = 64, 128


def arms(sparsity: float, which: str) -> dict[str, object]:
    """The arms at one sparsity, by name; `all` has those from which the defaults were chosen."""
    out: dict[str, object] = {
        "Dart": Dart(sparsity=sparsity),
        "GatedDart": GatedDart(sparsity=sparsity),
        "SketchDart": SketchDart(sparsity=sparsity),
        "PerToken": PerToken(sparsity=sparsity),
    }
    if which == "all":
        for importance in ("weights", "down", "none"):
            for rate in (0.15, 0.25, 0.4):
                token = TokenGate(rate=rate, importance=importance)
                out[f"gate {importance} {rate} uniform"] = GatedDart(sparsity=sparsity, token=token, budget=Uniform())
                out[f"gate {importance} {rate} depth"] = GatedDart(sparsity=sparsity, token=token)
        for bits in (1, 2, 3, 4):
            token = Sketch(bits=bits)
            out[f"sketch {bits} uniform"] = SketchDart(sparsity=sparsity, token=token)
            out[f"sketch {bits} depth"] = SketchDart(sparsity=sparsity, token=token, budget=DepthAware())
    return out


def compare_arms(model, tokens, sparsities, which) -> list[dict[str, object]]:
    """One row for each arm and sparsity."""
    dense, _ = forced_losses(model, Dense(), tokens, PROMPT)
    rows = []
    for sparsity in sparsities:
        for name, pruner in arms(sparsity, which).items():
            try:
                losses, report = forced_losses(model, pruner, tokens, PROMPT)
            except ValueError as error:  # a sketch that leaves nothing to compute
                rows.append({"arm": name, "target": sparsity, "refused": str(error)})
                continue
            over = losses - dense
            rows.append(
                {
                    "arm": name,
                    "target": sparsity,
                    "realised_sparsity": round(report.realised_sparsity, 4),
                    "bytes_saved": round(report.bytes_saved, 4),
                    "loss_over_dense": round(float(over.mean()), 4),
                    "first_stretch": round(float(over[:, : HALF - PROMPT].mean()), 4),
                    "second_stretch": round(float(over[:, HALF - PROMPT :].mean()), 4),
                    "kept": [layer.kept for layer in report.layers],
                    "model_bytes": report.overhead_bytes_per_model,
                }
            )
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def compare_layers(model, tokens, densities, bits) -> list[dict[str, object]]:
    """The sketch's choice and the exact one in each layer, at equal rows."""
    layers = describe(model).layers
    inputs = {}
    handles = [
        layer.entry.register_forward_pre_hook(lambda m, args, i=layer.index: inputs.update({i: args[0]}))
        for layer in layers
    ]
    dense = token_losses(model(tokens).logits[:, PROMPT - 1 : -1], tokens[:, PROMPT:]).mean()
    for handle in handles:
        handle.remove()
    rows = []
    for layer in layers:
        weights = row_weights(layer)
        x = inputs[layer.index][:, PROMPT - 1 :].flatten(0, 1)
        norms = weights.down.float().norm(dim=1)
        exact = layer.activations(x).float().abs() * norms
        scores = sketch_scores(x, weights, build_sketch(weights, bits), norms[None])
        for density in densities:
            kept = round(density * layer.neurons)
            row: dict[str, object] = {"layer": layer.index, "density": density, "bits": bits}
            masks = {}
            for name, score in (("sketch", scores), ("exact", exact)):
                wanted = torch.full((len(x),), kept, dtype=torch.int32)
                index, count, _ = chosen_rows(score, wanted, kept)
                masks[name] = chosen_mask(index, count, layer.neurons)
                energy = (exact.square() * masks[name]).sum(1) / exact.square().sum(1)
                row[f"{name}_energy"] = round(float(energy.mean()), 4)
                row[f"{name}_loss"] = round(float(_alone(model, tokens, layer, masks[name]) - dense), 5)
            both = (masks["sketch"] & masks["exact"]).sum(1)
            row["recall"] = round(float((both / masks["exact"].sum(1).clamp_min(1)).mean()), 4)
            rows.append(row)
            print(row, flush=True)
    return rows


def _alone(model, tokens, layer, mask):
    """Loss when this layer alone, after the prompt, computes only what the mask names."""

    def zero(module, args):
        a = args[0].clone()
        a[:, PROMPT - 1 :] *= mask.view(a.shape[0], -1, a.shape[-1])
        return (a,)

    handle = layer.down.register_forward_pre_hook(zero)
    try:
        return token_losses(model(tokens).logits[:, PROMPT - 1 : -1], tokens[:, PROMPT:]).mean()
    finally:
        handle.remove()


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Recall, energy and loss by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    densities = sorted({row["density"] for row in rows}, reverse=True)
    for i, density in enumerate(densities):
        mine = [row for row in rows if row["density"] == density]
        x = [row["layer"] for row in mine]
        label = f"{density:.0%} of the rows"
        axes[0].plot(x, [row["recall"] for row in mine], "o-", color=f"C{i}", label=label)
        for axis, key in ((axes[1], "energy"), (axes[2], "loss")):
            axis.plot(x, [row[f"sketch_{key}"] for row in mine], "o-", color=f"C{i}")
            axis.plot(x, [row[f"exact_{key}"] for row in mine], "x--", color=f"C{i}")
    titles = ("recall of the exact top-k", "output energy held", "loss over dense, this layer alone")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['bits']}-bit sketch (solid) and exact choice of each token (dashed)", fontsize=11)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="auto", help="of the weights; the sketch's share of the bytes follows")
    parser.add_argument("--streams", type=int, default=30)
    parser.add_argument("--sparsity", default="0.5,0.7,0.8")
    parser.add_argument("--bits", type=int, default=2, help="of the sketch in the table of layers")
    parser.add_argument("--arms", choices=("presets", "all"), default="presets")
    parser.add_argument("--no-layers", action="store_true", help="only the table of arms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype=args.dtype)
    documents = read_texts(args.texts, split=args.split)
    lengths = (HALF, HALF) if len(documents) > 1 else (2 * HALF,)
    cut = pieces(documents, tokenizer, 2 * HALF)
    chosen = streams(cut, lengths, args.streams, seed=args.seed, separator=tokenizer.bos_token_id)
    tokens = batch(chosen)
    sparsities = [float(part) for part in comma_list(args.sparsity)]
    data = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "model": Path(args.model).name if args.model else "demo",
        "dtype": args.dtype,
        "split": args.split,
        "streams": args.streams,
        "seed": args.seed,
        "arms": compare_arms(model, tokens, sparsities, args.arms),
    }
    if not args.no_layers:
        data["layers"] = compare_layers(model, tokens, [1 - s for s in sparsities], args.bits)
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
        if not args.no_layers:
            draw(data["layers"], args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
