"""Makes the sketches of a model's FFNs: from the weights, by sending inputs through a layer, or from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dartprune.errors import UserError
from dartprune.ffn.expected import error_moments, mean_and_variance
from dartprune.ffn.planes import build_planes
from dartprune.ffn.sketch import SKETCH_BITS, WORD, FFNSketch, SketchPlanes, estimated_sizes, sketch_dots
from dartprune.ffn.sketch import quantise_input as rounded
from dartprune.ffn.weights import FFNWeights
from dartprune.model.families import Decoder, describe
from dartprune.model.layer import Layer
from dartprune.model.probe import probed_bias, probed_columns
from dartprune.model.weights import row_weights
from dartprune.selectors.settings import Sketch

FORMAT, VERSION = "dartprune-sketch", "1"
_SAMPLED_NEURONS = 1024  # of a layer, when the number of bits is chosen
_SAMPLED_INPUTS = 64
_HARDLY_MORE = 1.2  # real inputs are kinder to few bits than random ones: chosen on training texts of two models
_HASHED = 1 << 24  # weights hashed at a time

Progress = Callable[[int, int], None]  # layers done, layers in all


@dataclass(frozen=True)
class Matrices:
    """What a sketch is made of: gate [I, H] or None, up [I, H] and their biases [I] or None."""

    gate: Tensor | None
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None


def matrices_of(layer: Layer, weights: FFNWeights | str, device: torch.device, dtype: torch.dtype) -> Matrices:
    """Gate and up by rows: views where rows can be read, else found by sending unit vectors through the layer."""
    if not isinstance(weights, str):
        return Matrices(weights.gate, weights.up, weights.gate_bias, weights.up_bias)
    up, up_bias = _probed(layer.up, layer.hidden, device, dtype)
    if layer.fused:
        (gate, up), (gate_bias, up_bias) = up.chunk(2), up_bias.chunk(2)
        return Matrices(gate, up, gate_bias, up_bias)
    if layer.gate is None:
        return Matrices(None, up, None, up_bias)
    gate, gate_bias = _probed(layer.gate, layer.hidden, device, dtype)
    return Matrices(gate, up, gate_bias, up_bias)


def _probed(module: nn.Module, inputs: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    columns = [block.to(dtype) for _, block in probed_columns(module, inputs, device, dtype)]
    return torch.cat(columns).t(), probed_bias(module, inputs, device, dtype)


def sketch_share(bits: int, layer: Layer, settings: Sketch) -> float:
    """Share of a layer's weight bytes that a sketch of that many bits takes, with what a token reads beside it.

    But for what stands in the place of dropped neurons: that is the same whatever the bits.
    """
    sketched = layer.matrices - 1
    each = sketched * (bits * -(-layer.hidden // WORD) * WORD // 8 + 4) + 4
    if settings.calibrate:
        each += 4 * sketched  # mean and variance, in 16 bits
    return each * layer.neurons / layer.weight_bytes


@torch.no_grad()
def captured(layer: Layer, parts: Matrices, norms: Tensor, sparsity: float, bits: int, settings: Sketch) -> float:
    """Share of the FFN's output energy that a sketch's choice holds for random inputs, at equal bytes; 0 if it cannot.

    Args:
        layer: whose FFN.
        parts: its gate and up.
        norms: float32 [I], of its down rows.
        sparsity: of the bytes, the sketch's own counted as read.
        bits: of the sketch.
        settings: its others.
    """
    some = torch.linspace(
        0, layer.neurons - 1, min(layer.neurons, _SAMPLED_NEURONS), dtype=torch.float32, device="cpu"
    ).long()
    kept = round((1 - sparsity - sketch_share(bits, layer, settings)) * len(some))
    if kept < 1:
        return 0.0
    # a norm comes before nearly every FFN: entries of unit size
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(_SAMPLED_INPUTS, layer.hidden, generator=generator, dtype=torch.float32, device="cpu")
    some, x = some.to(norms.device), x.to(norms.device)
    planes = rounded(x, *settings.rounding)
    exact: list[Tensor] = []
    estimate: list[Tensor] = []
    for weight, bias in ((parts.gate, parts.gate_bias), (parts.up, parts.up_bias)):
        if weight is not None:
            rows = weight[some].float()
            shift = 0.0 if bias is None else bias[some].float()
            exact.append(x @ rows.t() + shift)
            estimate.append(sketch_dots(planes, build_planes(rows, bits)) + shift)
    errors = None
    if settings.calibrate:
        ones = torch.ones(1, len(x), dtype=torch.float32, device=x.device)
        moments = [error_moments(e[None], f[None], ones) / len(x) for e, f in zip(exact, estimate, strict=True)]
        errors = mean_and_variance(torch.cat(moments, dim=1)).expand(len(x), -1, -1)
    true, found = (
        estimated_sizes(layer.activated, pair[0] if len(pair) > 1 else None, pair[-1], known) * norms[some]
        for pair, known in ((exact, None), (estimate, errors))
    )
    energy = true.square()
    chosen = found.topk(kept, dim=1).indices
    return float((energy.gather(1, chosen).sum(1) / energy.sum(1).clamp_min(torch.finfo(torch.float32).tiny)).mean())


class Sketcher:
    """Gives each layer its sketch."""

    def __init__(
        self,
        settings: Sketch,
        decoder: Decoder,
        sparsity: float,
        facts: Callable[[Layer], tuple[Matrices, Tensor]],
    ) -> None:
        """Settle the number of bits, or read the file.

        Args:
            settings: of the selector.
            decoder: the model.
            sparsity: of the pruner.
            facts: a layer's gate and up, and its down norms.

        Raises:
            ValueError: a file that is none of ours, of another version, of another model or of other settings.
        """
        self.settings = settings
        self._file = None if settings.file is None else SketchFile(settings.file)
        if self._file is not None:
            self._file.check(settings, decoder)
            self.bits = self._file.bits
        elif isinstance(settings.bits, int):
            self.bits = settings.bits
        else:
            self.bits = _best_bits(decoder, sparsity, facts, settings)

    def of(self, layer: Layer, parts: Matrices) -> FFNSketch:
        """The sketch of one layer; ValueError where the file was made from other weights."""
        if self._file is not None:
            gate, up = self._file.planes(layer, parts)
        else:
            gate = None if parts.gate is None else build_planes(parts.gate, self.bits)
            up = build_planes(parts.up, self.bits)
        return FFNSketch(gate, up, self.settings.activation_bits, min(self.settings.outliers, layer.hidden))


def _best_bits(
    decoder: Decoder, sparsity: float, facts: Callable[[Layer], tuple[Matrices, Tensor]], settings: Sketch
) -> int:
    """The fewest bits that lose hardly more of the output's energy than the best, in three layers together."""
    layers = decoder.layers
    lost = dict.fromkeys(SKETCH_BITS, 0.0)
    for number in sorted({0, len(layers) // 2, len(layers) - 1}):
        parts, norms = facts(layers[number])
        for bits in SKETCH_BITS:
            lost[bits] += 1 - captured(layers[number], parts, norms, sparsity, bits, settings)
    return next(bits for bits in SKETCH_BITS if lost[bits] <= _HARDLY_MORE * min(lost.values()))


class SketchFile:
    """A file of sketches, opened for reading."""

    def __init__(self, path: str) -> None:
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError(f"sketch file {path}: there is no such file; make it with dartprune.selectors.save_sketch")
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._facts = dict(file.metadata() or {})
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"sketch file {path}: no safetensors file ({error})") from None
        if self._facts.get("format") != FORMAT or self._facts.get("version") != VERSION:
            raise UserError(f"sketch file {path}: no {FORMAT} file of version {VERSION}: make it anew")
        self.bits = int(self._facts["bits"])

    def check(self, settings: Sketch, decoder: Decoder) -> None:
        """ValueError where the file does not fit the settings or the shape of the model."""
        if settings.bits not in ("auto", self.bits):
            raise UserError(f"sketch file {self.path}: it holds {self.bits} bits, the pruner asks for {settings.bits}")
        held = sum(name.endswith(".up.planes") for name in self._tensors)
        if held != len(decoder.layers):
            raise UserError(f"sketch file {self.path}: it holds {held} layers, the model has {len(decoder.layers)}")

    def planes(self, layer: Layer, parts: Matrices) -> tuple[SketchPlanes | None, SketchPlanes]:
        """The planes of one layer, on its device; ValueError where they were made from other weights."""
        if self._facts.get(f"weights.{layer.index}") != digest(parts):
            raise UserError(
                f"sketch file {self.path}: it was made from other weights (layer {layer.index}): make it anew"
            )
        up = self._planes(f"{layer.index}.up", layer, parts.up.device)
        return None if parts.gate is None else self._planes(f"{layer.index}.gate", layer, parts.up.device), up

    def _planes(self, name: str, layer: Layer, device: torch.device) -> SketchPlanes:
        planes, scale = self._tensors[f"{name}.planes"].to(device), self._tensors[f"{name}.scale"].to(device)
        return SketchPlanes(planes, scale, layer.hidden)


def digest(parts: Matrices) -> str:
    """A hash of gate and up, whatever their memory layout."""
    state = hashlib.sha256()
    for matrix in (parts.gate, parts.up):
        if matrix is None:
            continue
        state.update(str((tuple(matrix.shape), matrix.dtype)).encode())
        for rows in matrix.detach().split(max(1, _HASHED // matrix.shape[1])):
            state.update(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:32]


@torch.no_grad()
def save_sketch(model: nn.Module, path: str | Path, bits: int, progress: Progress | None = None) -> None:
    """Write the sketches of a model's FFNs to a safetensors file, to be named by `Sketch(file=...)`.

    Args:
        model: a decoder of transformers.
        path: where to write.
        bits: 1 to 4 per weight.
        progress: told how many layers are done, of how many.

    Raises:
        ValueError: bits outside 1 to 4, or weights whose rows cannot be read (those are sketched at each attach).
    """
    from safetensors.torch import save_file

    if isinstance(bits, bool) or bits not in SKETCH_BITS:
        raise UserError(f"bits must be one of {SKETCH_BITS}, got {bits!r}")
    layers = describe(model).layers
    tensors: dict[str, Tensor] = {}
    facts = {"format": FORMAT, "version": VERSION, "bits": str(bits)}
    for layer in layers:
        weights = row_weights(layer)
        if isinstance(weights, str):
            raise UserError(f"no sketch file of this model: {weights}")
        parts = Matrices(weights.gate, weights.up, None, None)
        for name, matrix in (("gate", parts.gate), ("up", parts.up)):
            if matrix is not None:
                made = build_planes(matrix, bits)
                tensors[f"{layer.index}.{name}.planes"] = made.planes.cpu()
                tensors[f"{layer.index}.{name}.scale"] = made.scale.cpu()
        facts[f"weights.{layer.index}"] = digest(parts)
        if progress is not None:
            progress(layer.index + 1, len(layers))
    save_file(tensors, str(path), metadata=facts)
