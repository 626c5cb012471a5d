"""What a method costs on a model of a given shape, by arithmetic: bytes held, operations, bytes of a decode step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dartprune.drift import KEPT_WINDOWS
from dartprune.method import Method
from dartprune.model.families import describe
from dartprune.model.layer import held
from dartprune.model.sizes import count
from dartprune.runtime.reasons import CAUSES
from dartprune.runtime.trace import STATISTICS


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. attention_parameters: of one layer.  head_parameters: of the unembedding.

    other_parameters: read in no decode step as a whole (embeddings that are not tied) or negligible (norms).
    ffn_weight_bytes, outside_weight_bytes: of a weight of the FFNs, and of one that a step reads besides; scales and
    lows of quantised weights included.
    """

    layers: int
    hidden: int
    neurons: int
    matrices: int
    attention_parameters: int
    head_parameters: int
    other_parameters: int = 0
    ffn_weight_bytes: float = 2
    outside_weight_bytes: float = 2

    @classmethod
    def of(cls, model: Any) -> Shape:
        """The shape of a model; layers of unequal width count with their mean."""
        decoder = describe(model)
        first = decoder.layers[0]
        neurons = round(sum(layer.neurons for layer in decoder.layers) / len(decoder.layers))
        matrices = 3 if first.gated else 2
        ffn = len(decoder.layers) * matrices * neurons * decoder.hidden
        head = model.get_output_embeddings()
        (total, total_bytes), (of_embedding, embedding_bytes) = count(model), count(model.get_input_embeddings())
        head_parameters = 0 if head is None else count(head)[0]
        both = head is not None and not _share(head, model.get_input_embeddings())
        untied, untied_bytes = (of_embedding, embedding_bytes) if both else (0, 0)
        ffn_bytes = sum(layer.weight_bytes for layer in decoder.layers)
        attention = (total - ffn - head_parameters - untied) // len(decoder.layers)
        outside = len(decoder.layers) * attention + head_parameters
        return cls(
            layers=len(decoder.layers),
            hidden=decoder.hidden,
            neurons=neurons,
            matrices=matrices,
            attention_parameters=attention,
            head_parameters=head_parameters,
            other_parameters=untied,
            ffn_weight_bytes=ffn_bytes / ffn,
            outside_weight_bytes=(total_bytes - ffn_bytes - untied_bytes) / outside,
        )

    @property
    def ffn_parameters(self) -> int:
        """Weights of all FFNs."""
        return self.layers * self.matrices * self.neurons * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.ffn_parameters + self._outside + self.other_parameters

    @property
    def _outside(self) -> int:
        return self.layers * self.attention_parameters + self.head_parameters

    @property
    def ffn_bytes(self) -> int:
        """FFN weight bytes of a dense decode step."""
        return round(self.ffn_parameters * self.ffn_weight_bytes)

    @property
    def step_bytes(self) -> int:
        """Weight bytes of a dense decode step; the cache of keys and values comes on top."""
        return self.ffn_bytes + round(self._outside * self.outside_weight_bytes)

    @property
    def step_flops(self) -> int:
        """Floating point operations of a dense decode step, attention over the cache left out."""
        return 2 * (self.ffn_parameters + self._outside)


def _share(head: nn.Module, embedding: nn.Module) -> bool:
    """Whether a head and an embedding keep the same weights."""
    places = {tensor.data_ptr() or id(tensor) for tensor in held(embedding)}  # on the meta device nothing has a place
    return any((tensor.data_ptr() or id(tensor)) in places for tensor in held(head))


LLAMA_3_1_8B = Shape(
    layers=32,
    hidden=4096,
    neurons=14336,
    matrices=3,
    attention_parameters=2 * 4096 * 4096 + 2 * 4096 * 1024,
    head_parameters=128256 * 4096,
    other_parameters=128256 * 4096,
)


def memory_per_sequence(shape: Shape, method: Method, *, masks: bool = False) -> int:
    """Bytes that one sequence holds besides its cache (DART section 4.4 claims under 10 MB for 8 B parameters).

    Args:
        shape: of the model.
        method: what is attached.
        masks: whether the backend zeroes neurons and so keeps a mask beside the index lists.
    """
    layers, hidden, neurons = shape.layers, shape.hidden, shape.neurons
    statistics = sum(name in STATISTICS for name in method.inputs)
    total = 4 * layers * neurons * statistics
    total += layers * (5 * 4 + 4)  # impact sums and token count
    total += layers * (4 * _width(shape, method) + 4)
    if method.token is not None:
        total += layers * 4  # neurons for each token
        if method.token.learns:  # mean and variance of each estimate's errors, and how many tokens taught them
            total += layers * (2 * 2 * (shape.matrices - 1) * neurons + 4)
    if masks and (method.token is None or method.token.context):
        total += layers * neurons
    if method.compensate == "mean":
        total += layers * 4 * hidden
        if method.token is not None:  # the means themselves, and of how many tokens they are
            total += layers * (2 + 1) * neurons
    replay = method.refresh.replay_tokens
    if replay:
        total += layers * (replay + 1) * (hidden + 4)  # eight bits a value, a scale for each token
    if method.refresh.detects:
        total += 4 * method.detector.window * hidden
    total += 4 * hidden * (KEPT_WINDOWS + 1)
    return total + 8 * (2 + len(CAUSES) + 1) + 2 * 4  # counters


def _width(shape: Shape, method: Method) -> int:
    """Longest list of kept neurons, or of candidates."""
    share = 1.0 if method.selection == "threshold" else method.budget.most_kept(method.sparsity)
    if method.token is None:
        return round(share * shape.neurons)
    if not method.token.context:
        return 0
    return method.token.split(share * shape.neurons, shape.neurons, gated=shape.matrices == 3)[0]


def overhead_flops_per_token(shape: Shape, method: Method, prompt: int, decoded: int) -> float:
    """Extra operations of tracing, scoring and detecting per decoded token, averaged over a text.

    Args:
        shape: of the model.
        method: what is attached.
        prompt: traced tokens.
        decoded: decoded tokens.
    """
    layers, hidden, neurons = shape.layers, shape.hidden, shape.neurons
    tracing = prompt * layers * (2 * neurons + 10 * hidden)  # squares and sums; two norms, a product, a difference
    scoring = layers * neurons * (1 + 2 * max(1, neurons.bit_length()))  # a root, then sorting
    detecting = 0.0
    if method.refresh.detects:
        each = 2 * hidden * (1 + 4 * KEPT_WINDOWS)  # a mean, and the cosines of all kept windows
        detecting = decoded * 2 * hidden + decoded / method.detector.window * each
    return (tracing + scoring + detecting) / decoded


def replay_flops(shape: Shape, method: Method) -> int:
    """Operations of one replay of one sequence."""
    rows = method.refresh.replay_tokens
    return 2 * rows * shape.layers * (shape.matrices - 1) * shape.neurons * shape.hidden
