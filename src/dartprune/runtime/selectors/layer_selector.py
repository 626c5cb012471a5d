"""Token selectors at work in one layer: which neurons each row of a forward uses, and what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dartprune.ffn.selector_kernels import SelectorKernels
from dartprune.ffn.selector_ops import TokenRows, chosen_mask, chosen_rows
from dartprune.ffn.sketch import AnySketch, Products
from dartprune.ffn.weights import FFNWeights
from dartprune.model.layer import Decoder, Layer
from dartprune.runtime.selection import LayerSelection
from dartprune.runtime.slot_tensors import SlotTensors
from dartprune.selectors.settings import Exact, register_selector

Place = tuple[torch.device, torch.dtype]


@dataclass
class LayerFacts:
    """What a selector is made of in one layer.

    place: where it computes, and in which dtype.  weights: as the backend wants them, or why there are none.
    norms: of the down rows, float32 [I].  kernels: of the backend, None where the choice is applied as a mask.
    sketch: set by the selector that has one, so that its kernels are made ready.
    """

    layer: Layer
    place: Place
    weights: FFNWeights | str
    norms: Tensor
    kernels: SelectorKernels | None = None
    sketch: AnySketch | None = None


@dataclass(frozen=True)
class Lesson:
    """What some tokens teach.

    errors: sums over the tokens of each line, float32 [B, ...]; None where a selector is not calibrated.
    size: mean square of each line's inputs, float32 [B].
    dropped: see `ffn.dropped.dropped_sums`; None where nothing stands in the place of dropped neurons.
    """

    errors: Tensor | None
    size: Tensor
    dropped: Tensor | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a selector may look at before its layers are made: the model, the method's sparsity, facts of a layer.

    compensate: whether the method wants the mean of what was dropped in its place.
    """

    decoder: Decoder
    sparsity: float
    facts: Callable[[Layer], LayerFacts]
    compensate: bool = False


class LayerSelector(SlotTensors, ABC):
    """One layer's selector: `wanted` int32 [slots] neurons for each token of a slot.

    row_share: share of the layer's weights that one chosen neuron costs.  chosen_bytes: the same in bytes.
    chosen_cost: the same in neurons, for a selector whose every candidate is a whole neuron.
    kernels: the backend's operators; None where the choice is applied as a mask.

    The neurons that each row of a forward used, int32 [N], and how many the backend read for all rows together, a
    scalar, wait here until it is known which of the rows count.
    """

    wanted: Tensor
    has_kernels: ClassVar[bool] = False  # whether `compute` is there; else the choice is applied as a mask
    chosen_cost = 1.0
    calibrates = False  # whether the context's tokens teach it how wrong its estimates are
    compensates = False  # whether they teach it what stands in the place of dropped neurons

    @classmethod
    def prepared(cls, settings: Any, model: ModelFacts) -> Callable[[LayerFacts], LayerSelector]:
        """Called once for a model; gives what makes the selector of each layer.

        Args:
            settings: the method's token selector.
            model: what is attached.
        """
        return lambda facts: cls(facts.layer, facts.place[0], facts.norms, facts.layer.matrices)

    def __init__(
        self,
        layer: Layer,
        device: torch.device,
        importance: Tensor | None,
        chosen_matrices: int,
        kernels: SelectorKernels | None = None,
    ) -> None:
        """Set up.

        Args:
            layer: whose FFN.
            device: where it computes.
            importance: what each neuron's activation is multiplied with, float32 [I]; None: 1.
            chosen_matrices: rows that choosing a neuron costs.
            kernels: see the class.
        """
        super().__init__(device)
        self.layer = layer
        self.kernels = kernels
        self.importance = None if importance is None else importance[None].contiguous()
        self.row_share = chosen_matrices / (layer.matrices * layer.neurons)
        self.chosen_bytes = layer.weight_bytes * self.row_share
        self._masked: Tensor | None = None
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of rows
        self._asked = False
        self._allocate("wanted", (), torch.int32)

    @property
    def learns(self) -> bool:
        """Whether the context's tokens teach it."""
        return self.calibrates or self.compensates

    def expect(self, wanted: int) -> None:
        """What a slot's tokens will want, until its budget is known; called before there are slots."""
        self._fills["wanted"] = wanted

    def fixed_share(self, candidates: int) -> float:
        """Share of the layer's weight bytes that a token reads whatever it chooses."""
        return 0.0

    def fixed_bytes(self, candidates: int, lines: int) -> int:
        """Bytes that a forward of that many lines reads whatever its rows choose, `candidates` of all of them."""
        return round(self.fixed_share(candidates) * self.layer.weight_bytes)

    @property
    def held(self) -> int:
        """Bytes held for the model, whatever the number of sequences."""
        return 0 if self.importance is None else self.importance.nbytes

    @property
    def saves_time(self) -> bool:
        """Whether the kernels leave unread what is not chosen."""
        return self.kernels is not None and self.kernels.saves_time

    @property
    def reads_union(self) -> bool:
        """Whether a neuron that several rows need is read once for all of them."""
        return self.kernels is None or self.kernels.reads_union

    def take(self, rows: int, *, gathered: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the rows of the last forward used and the backend read for them; None where no choice was made.

        Where neurons were gathered and nobody asked here, a CUDA graph of an earlier forward of so many rows was
        replayed: it filled that forward's counts anew.
        """
        asked, self._asked = self._asked, False
        masked, self._masked = self._masked, None
        if gathered or asked:
            return self._gathered.get(rows, (None, None))
        return masked, None

    def lesson(self, x: Tensor, weight: Tensor, slots: Tensor, products: Products | None = None) -> Lesson:
        """What tokens of the context teach.

        Args:
            x: their inputs of the FFN, [B, m, H].
            weight: float32 [B, m] of 0 and 1; of tokens that weigh 0 the inputs may be anything.
            slots: int64 [B].
            products: their exact products with gate and up, [B * m, I] each; None: computed here.
        """
        raise RuntimeError(f"{type(self).__name__} does not learn from the context")

    def learn(self, lesson: Lesson, slots: Tensor, weight: Tensor, memory: float | None = None) -> None:
        """Take a lesson in.

        Args:
            lesson: of B lines.
            slots: int64 [B], no slot twice.
            weight: float32 [B, m] of 0 and 1, of the tokens that it was made from.
            memory: None counts them beside all former ones; else the share that is kept of what was known.
        """
        raise RuntimeError(f"{type(self).__name__} does not learn from the context")

    def ffn(self, x: Tensor, weights: FFNWeights, selection: LayerSelection, slots: Tensor) -> Tensor:
        """The FFN of rows x [N, H], each over its own neurons; slots int64 [N]."""
        rows = self.compute(x, weights, selection.index, selection.count, slots, self.wanted)
        if x.shape[0] == 1:
            union = rows.count[0]
        elif self.reads_union:
            union = chosen_mask(rows.index, rows.count, weights.neurons).any(0).sum()
        else:
            union = rows.count.sum()
        self.chosen(rows.count, union)
        return rows.out

    def chosen(self, count: Tensor, union: Tensor) -> None:
        """What rows of a forward used, int32 [N], and how many neurons the backend read for them, a scalar."""
        self._gathered[count.shape[0]] = count, union
        self._asked = True

    def compute(
        self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor, wanted: Tensor
    ) -> TokenRows:
        """The backend's operator; candidates index [S, W], count [S] and `wanted` [S] of every slot."""
        raise RuntimeError(f"{type(self).__name__} computes inside the model's own FFN")

    def mask(self, a: Tensor, x: Tensor, selection: LayerSelection, slots: Tensor) -> Tensor:
        """Which neurons each row uses, for an FFN that is computed whole.

        Args:
            a: input of the down projection, [N, I].
            x: input of the FFN, [N, H].
            selection: the candidates of each slot.
            slots: int64 [N], the slot of each row.

        Returns:
            bool [N, I]; all ones where a slot has no selection.
        """
        scores = self.scores(a, x, slots)
        if self.importance is not None:
            scores = scores * self.importance
        if not selection.everything:
            scores = scores.masked_fill(~selection.rows_mask(slots), 0.0)
        index, taken, _ = chosen_rows(scores, self.wanted.index_select(0, slots), scores.shape[1])
        self._masked = taken
        dense = selection.count.index_select(0, slots) < 0
        return chosen_mask(index, taken, scores.shape[1]) | dense[:, None]

    def filled(self, a: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        """A [N, I] with what stands in the place of what `mask` (bool [N, I]) leaves out; slots int64 [N]."""
        return a.masked_fill(~mask, 0)

    @abstractmethod
    def scores(self, a: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        """What is multiplied with the importance, float32 [N, I], not negative; slots int64 [N]."""


@register_selector(Exact)
class ExactLayer(LayerSelector):
    """The highest `|a_i| * |W_down[:, i]|` of each row, exactly."""

    def scores(self, a: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        """`|a|`."""
        return a.float().abs()
