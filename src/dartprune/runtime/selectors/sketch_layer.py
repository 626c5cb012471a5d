"""The sketch at work in one layer, and what it learns from the context (docs/token-selection.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.ffn.dropped import Drops
from dartprune.ffn.estimates import estimated, exact_and_estimated
from dartprune.ffn.expected import mean_and_square, mean_and_variance
from dartprune.ffn.lessons import Activation, lesson_sums
from dartprune.ffn.quantised import NestedSketch, QuantisedRows
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.sketch import AnySketch, Products, estimated_sizes
from dartprune.ffn.weights import FFNWeights
from dartprune.model.layer import Layer
from dartprune.model.packed_rows import packed_rows
from dartprune.runtime.selectors.layer_selector import LayerFacts, LayerSelector, Lesson, ModelFacts, Place
from dartprune.selectors.settings import Sketch, register_selector
from dartprune.selectors.sketches import Matrices, Sketcher, matrices_of

# that the errors of rounding, and a mean of 0, count for; 4 and 8 are alike, and better than 1 for short prompts
PRIOR_TOKENS = 8.0
_PROBES = 32  # inputs that tell what the rounding alone does


@register_selector(Sketch)
class SketchLayer(LayerSelector):
    """The highest `|act(g^) u^| * |W_down[:, i]|`, estimated from bit planes (after SparseInfer, arXiv 2411.12692).

    Calibrated, `errors` bf16 [slots, 4 or 2, I] are means and variances of each sequence's errors of estimate (see
    `ffn.expected`), `known` float32 [slots] says from how many tokens, and the score is what is expected under them.

    Where it compensates, `means` bf16 [slots, I] stand in the place of what a token drops (see `ffn.dropped`),
    `drops` uint8 [slots, I] says in how many tokens each neuron was dropped for them, and `compensation` float32
    [slots, H] is what all means give together, for the kernels. Which neurons a token of the context drops is told by
    the estimates alone, without what is known of their errors: so it depends on nothing but the token.
    """

    errors: Tensor
    known: Tensor
    means: Tensor
    drops: Tensor
    compensation: Tensor
    has_kernels = True

    @classmethod
    def prepared(cls, settings: Sketch, model: ModelFacts) -> Callable[[LayerFacts], LayerSelector]:
        """See `LayerSelector.prepared`: the number of bits is settled, or the file is read."""

        def parts(layer: Layer) -> tuple[Matrices, Tensor]:
            facts = model.facts(layer)
            return matrices_of(layer, facts.weights, *facts.place), facts.norms

        packed = packed_rows(model.decoder.layers[0])
        if packed is not None:
            _check_nested(settings, packed)
        sketcher = None if packed else Sketcher(settings, model.decoder, model.sparsity, parts)

        learns = {"calibrate": settings.calibrate, "compensate": model.compensate}

        def make(facts: LayerFacts) -> SketchLayer:
            rows = facts.weights
            if isinstance(rows, QuantisedRows):
                facts.sketch = NestedSketch(rows)
                return cls(facts, facts.sketch, (rows.gate_bias, rows.up_bias), **learns)
            matrices = matrices_of(facts.layer, facts.weights, *facts.place)
            assert sketcher is not None  # a model is packed as a whole
            facts.sketch = sketcher.of(facts.layer, matrices)
            biases = matrices.gate_bias, matrices.up_bias
            return cls(facts, facts.sketch, biases, **learns)

        return make

    def __init__(
        self,
        facts: LayerFacts,
        sketch: AnySketch,
        biases: tuple[Tensor | None, Tensor | None],
        *,
        calibrate: bool,
        compensate: bool,
    ) -> None:
        """Set up.

        Args:
            facts: of the layer.
            sketch: of its gate and up.
            biases: of gate and up, or None each.
            calibrate: whether the context's tokens teach it how wrong the estimates are.
            compensate: whether they teach it what stands in the place of dropped neurons.
        """
        super().__init__(facts.layer, facts.place[0], facts.norms, facts.layer.matrices, facts.kernels)
        if isinstance(sketch, NestedSketch):
            # a chosen neuron's tail alone is read: its head was, as the sketch
            self.chosen_cost = sketch.rows.layout.tail / sketch.rows.row_bytes
            self.row_share *= self.chosen_cost
            self.chosen_bytes *= self.chosen_cost
        self.sketch = sketch
        self.gate_bias, self.up_bias = biases
        self._dtype = facts.place[1]
        self._activation = Activation(facts.layer.activated, facts.layer.activation)
        self.calibrates, self.compensates = calibrate, compensate
        self._rounding: Tensor | None = None
        if calibrate:
            self._rounding = self._rounding_errors(facts.place)
            self._allocate("errors", tuple(self._rounding.shape), torch.bfloat16)
            self._allocate("known", (), torch.float32)
        if compensate:
            neurons = (self.layer.neurons,)
            self._allocate("means", neurons, torch.bfloat16)
            self._allocate("drops", neurons, torch.uint8)
            self._allocate("compensation", (self.layer.hidden,), torch.float32)

    def fixed_share(self, candidates: int) -> float:
        """The sketch itself, the norms of the down rows and what the sequence's context taught."""
        return self.fixed_bytes(candidates, 1) / self.layer.weight_bytes

    def fixed_bytes(self, candidates: int, lines: int) -> int:
        """The sketch and the norms once, each sequence's errors and means."""
        learnt = 0 if self._rounding is None else self._rounding.nbytes
        if self.compensates:
            learnt += 2 * self.layer.neurons + 4 * self.layer.hidden
        return self.sketch.bytes + super().held + learnt * lines

    @property
    def held(self) -> int:
        """Bytes of the planes, their scales and the norms, and of the errors that every sequence begins with."""
        planes = 0 if isinstance(self.sketch, NestedSketch) else self.sketch.bytes
        return planes + super().held + (0 if self._rounding is None else self._rounding.nbytes)

    def compute(
        self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor, wanted: Tensor
    ) -> TokenRows:
        """See `LayerSelector.compute`."""
        assert self.kernels is not None and self.importance is not None
        errors = self.errors if self.calibrates else None
        others = (self.means, self.compensation) if self.compensates else (None, None)
        choice = slots, wanted, self.importance, weights.neurons, None, errors, *others
        return self.kernels.sketched_rows(x, weights, self.sketch, *choice)

    def filled(self, a: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        """See `LayerSelector.filled`."""
        if not self.compensates:
            return super().filled(a, mask, slots)
        return torch.where(mask, a, self.means.index_select(0, slots).to(a.dtype))

    def scores(self, a: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        """`|act(g^) u^|`, or `|act(u^)|` where there is no gate; what is expected of it where the context taught."""
        errors = self.errors.index_select(0, slots) if self.calibrates else None
        return estimated_sizes(self.layer.activated, *self._estimates(x), errors)

    def _estimates(self, x: Tensor) -> Products:
        """Estimated products of x [N, H] with gate (None for a plain FFN) and up, biases added, float32 [N, I]."""
        return self._biased(estimated(x, self.sketch))

    def _exact_and_estimated(self, x: Tensor) -> tuple[Products, Products]:
        """Products of x [N, H] with gate and up, and `_estimates` of them."""
        if isinstance(self.sketch, NestedSketch):
            exact, estimates = exact_and_estimated(x, self.sketch)
            return self._biased(exact), self._biased(estimates)
        return self.layer.products(x), self._estimates(x)

    def _biased(self, products: Products) -> Products:
        """Products without biases, with them."""
        gate, up = products
        if gate is not None and self.gate_bias is not None:
            gate = gate + self.gate_bias.float()
        return gate, up if self.up_bias is None else up + self.up_bias.float()

    @torch.no_grad()
    def lesson(self, x: Tensor, weight: Tensor, slots: Tensor, products: Products | None = None) -> Lesson:
        """See `LayerSelector.lesson`: sums of the sketch's errors and their squares, of gate and up, [B, 4 or 2, I]."""
        rows = x.reshape(-1, x.shape[-1])
        exact, estimates = self._exact_and_estimated(rows) if products is None else (products, self._estimates(rows))
        drops = None
        if self.compensates:
            assert self.importance is not None
            drops = Drops(self.importance, self.wanted.index_select(0, slots))
        errors, dropped = lesson_sums(self._activation, exact, estimates, weight, drops)
        # of a norm's outputs all tokens have about the same size, so the first one tells it
        return Lesson(errors if self.calibrates else None, x[:, 0].float().square().mean(-1), dropped)

    @torch.no_grad()
    def learn(self, lesson: Lesson, slots: Tensor, weight: Tensor, memory: float | None = None) -> None:
        """See `LayerSelector.learn`."""
        if lesson.errors is not None:
            self._learn_errors(lesson.errors, lesson.size, slots, weight, memory)
        if lesson.dropped is not None:
            self._learn_means(lesson.dropped, slots, memory)

    def _learn_errors(self, sums: Tensor, size: Tensor, slots: Tensor, weight: Tensor, memory: float | None) -> None:
        """The moments of the sketch's errors, first of all those of the rounding alone."""
        assert self._rounding is not None
        n_new, n_old = weight.sum(1), self.known.index_select(0, slots)
        old = mean_and_square(self.errors.index_select(0, slots))
        # nothing may be known, and nothing new: then nothing begins
        first = (n_old == 0) & (n_new > 0)
        old = torch.where(first[:, None, None], self._rounding.float() * size[:, None, None], old)
        n_old = torch.where(first, PRIOR_TOKENS, n_old)
        share = n_old / (n_old + n_new) if memory is None else torch.full_like(n_old, memory)
        share = torch.where(n_new > 0, share, 1.0)
        mean = sums / n_new.clamp_min(1)[:, None, None]
        errors = mean_and_variance(torch.lerp(mean, old, share[:, None, None]))
        self.errors.index_copy_(0, slots, errors.bfloat16())
        self.known.index_copy_(0, slots, n_old + n_new)

    def _learn_means(self, sums: Tensor, slots: Tensor, memory: float | None) -> None:
        """The means of what was dropped, as if each neuron had given 0 in some tokens before the first."""
        new, n_new = sums.unbind(1)
        n_old = self.drops.index_select(0, slots).float() * (1.0 if memory is None else memory)
        share = PRIOR_TOKENS * (1.0 if memory is None else memory) + n_old
        old = self.means.index_select(0, slots).float()
        means = ((old * share + new) / (share + n_new)).bfloat16()
        self.means.index_copy_(0, slots, means)
        self.drops.index_copy_(0, slots, (n_old + n_new).round().clamp(max=255).to(torch.uint8))
        if self.kernels is None:
            return  # a choice that is applied as a mask is filled with the means themselves
        self.compensation.index_copy_(0, slots, self.layer.given(means.to(self._dtype)))

    @torch.no_grad()
    def _rounding_errors(self, place: Place) -> Tensor:
        """Moments of the errors for inputs of unit size without direction, bf16 [4 or 2, I]: no mean, and a square.

        They stand for a few tokens at the beginning of each sequence, so that a short prompt does no harm.
        """
        device, dtype = place
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(1, _PROBES, self.layer.hidden, generator=generator, dtype=torch.float32, device="cpu")
        ones = torch.ones(1, _PROBES, dtype=torch.float32, device=device)
        rows = x.to(device, dtype).flatten(0, 1)
        products = self._exact_and_estimated(rows)
        moments = lesson_sums(self._activation, *products, ones, None)[0][0] / _PROBES
        moments[::2] = 0.0
        return moments.bfloat16()


def _check_nested(settings: Sketch, rows: QuantisedRows) -> None:
    """ValueError where packed rows cannot be their own sketch, or another one is asked for."""
    if not rows.layout.low:
        raise UserError("Sketch: the rows of this model are not nested: quantise it with nested=True")
    if settings.bits != "auto" or settings.file is not None:
        raise UserError(
            f"Sketch: the high {rows.layout.high} bits of this model's {rows.layout.bits}-bit rows are its sketch: "
            "leave bits='auto' and file=None"
        )
