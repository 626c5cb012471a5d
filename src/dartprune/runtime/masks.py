"""Makes masks: from the trace at the start, from replayed inputs at an event (DART section 3.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.budget import DOWN_SQUARE, Global, keep_counts
from dartprune.method import Method
from dartprune.runtime.device_values import Once
from dartprune.runtime.layer_hooks import LayerRun
from dartprune.runtime.slots import Counters, Slot
from dartprune.scoring import LAYER, NOISE, WEIGHT_FACTS, keep_above_mean, keep_top, scorer


class Renewal:
    """Builds and replays the masks of some slots, all layers at one token boundary."""

    def __init__(
        self,
        method: Method,
        layers: Sequence[LayerRun],
        counters: Counters,
        facts: Callable[[LayerRun, str], Tensor],
    ) -> None:
        """Set up.

        Args:
            method: what to do.
            layers: all layers.
            counters: where the share of the FFN that a slot leaves out is kept.
            facts: gives a layer's `down_norm`, `proxy_max` or `proxy_mean`, float32 [I], or `down_square` [].
        """
        self.method = method
        self.layers = layers
        self.counters = counters
        self.scorer = scorer(method.scorer)
        self.tokens = [layer.token for layer in layers if layer.token is not None]
        self.target = method.sparsity + _overhead(layers)
        if self.target >= 1:
            raise ValueError(
                f"{method.name}: sparsity {method.sparsity:g} cannot be reached: the sketch alone reads "
                f"{_overhead(layers):.3f} of the FFN's bytes; use fewer bits or a lower sparsity"
            )
        self.flops = 0
        self.replays = 0
        self.version = 0  # counts changes of any mask
        self._facts = facts
        self._once = Once()

    def build(self, slots: Sequence[Slot]) -> list[Tensor]:
        """New budgets and masks from the traces; returns the number of newly kept neurons of each slot."""
        ids = self._ids(slots)
        sums_of = [layer.trace.impact.index_select(0, ids[layer.trace.device]) for layer in self.layers]
        # the budget is made on the host: one transfer for all layers
        impact = torch.stack([part.to(self.counters.device) for part in sums_of], dim=1).cpu().double()
        neurons = [layer.layer.neurons for layer in self.layers]
        for slot, sums in zip(slots, impact, strict=True):
            means = (sums[:, :2] / sums[:, 2:3].clamp_min(1)).float()
            if isinstance(self.method.budget, Global):
                stream = (sums[:, 3] / sums[:, 4].clamp_min(1)).exp()
                pruned = self.method.budget.rank(self._contributions(slot, stream), self.target)
            else:
                pruned = self.method.budget(means[:, 0], means[:, 1], self.target, neurons)
            slot.former, slot.keep = slot.keep or slot.former, keep_counts(pruned, neurons)
            self._split(slot, pruned)
        return self._select(slots)

    def _contributions(self, slot: Slot, stream: Tensor) -> list[Tensor]:
        """What each neuron adds to the residual stream of a slot, of the stream's square [L] there."""
        out = []
        for layer, square in zip(self.layers, stream.tolist(), strict=True):
            factor = float(self._facts(layer, DOWN_SQUARE)) / max(square, 1e-30)
            out.append((layer.trace.tensors()["energy"][slot.id] * factor).to(self.counters.device))
        return out

    def _split(self, slot: Slot, pruned: Tensor) -> None:
        """With a token selector, what the budget leaves is candidates and neurons for each token."""
        selector = self.method.token
        if selector is None:
            return
        pairs = [
            selector.split((1 - float(p)) * layer.layer.neurons, layer.layer.neurons, gated=layer.layer.gated)
            for p, layer in zip(pruned.tolist(), self.layers, strict=True)
        ]
        slot.keep, slot.chosen = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for token, count in zip(self.tokens, slot.chosen, strict=True):
            token.wanted[slot.id] = count

    def replay(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Renew the statistics from the buffered inputs and choose anew within the budgets in force."""
        self.replays += 1
        length = self.method.refresh.replay_tokens
        order = torch.arange(length, dtype=torch.int64, device="cpu")
        places = torch.stack([(slot.ring_next - length + order) % length for slot in slots])
        # a young sequence has not filled its ring: the oldest places do not count yet
        weight = torch.stack([(order >= length - slot.ring_fill).float() for slot in slots])
        ids = self._ids(slots)
        on = {device: (rows, places.to(device), weight.to(device)) for device, rows in ids.items()}
        for layer in self.layers:
            assert layer.ring is not None
            rows, where, counted = on[layer.ring.device]
            a = layer.layer.activations(layer.ring.read(rows, where))
            layer.trace.blend(a, rows, counted, self.method.refresh.replay_memory)
            matrices = 2 if layer.layer.gated else 1
            self.flops += 2 * matrices * layer.layer.neurons * layer.layer.hidden * length * len(slots)
        for slot in slots:
            slot.former = list(slot.keep) if slot.keep is not None else None
        return self._select(slots)

    def drop(self, slots: Sequence[Slot]) -> None:
        """Every neuron again, in every layer."""
        self.version += 1
        rows = [slot.id for slot in slots]
        for layer in self.layers:
            layer.selection.open(rows)
        for slot in slots:
            self.counters.share[slot.id] = 0.0
            slot.former, slot.keep, slot.chosen = slot.keep, None, None

    def forget(self, slots: Sequence[Slot]) -> None:
        """Start the traces of these slots from nothing."""
        rows = [slot.id for slot in slots]
        for layer in self.layers:
            layer.trace.clear(rows)

    def _select(self, slots: Sequence[Slot]) -> list[Tensor]:
        self.version += 1
        changed = [torch.zeros((), dtype=torch.int64, device=self.counters.device) for _ in slots]
        left_out = [0.0] * len(slots)
        whole = float(sum(layer.layer.weights for layer in self.layers))
        for number, layer in enumerate(self.layers):
            if layer.selection.everything:
                layer.selection.write_all([slot.id for slot in slots])
            else:
                self._write(number, layer, slots, changed)
            for i, slot in enumerate(slots):
                left_out[i] += layer.layer.weights * (1 - self._fixed_share(number, layer, slot))
        for slot, left in zip(slots, left_out, strict=True):
            self.counters.share[slot.id] = left / whole
        return changed

    def _ids(self, slots: Sequence[Slot]) -> dict[torch.device, Tensor]:
        """The ids of these slots on each device, copied there once for all layers."""
        ids = [slot.id for slot in slots]
        return {device: self._once(ids, device) for device in {layer.trace.device for layer in self.layers}}

    def _fixed_share(self, number: int, layer: LayerRun, slot: Slot) -> float:
        """Share of a layer's weights that every token of a slot uses, whatever it chooses for itself."""
        assert slot.keep is not None
        if layer.token is not None:
            return layer.token.fixed_share(slot.keep[number])
        return slot.keep[number] / layer.layer.neurons

    def _write(self, number: int, layer: LayerRun, slots: Sequence[Slot], changed: list[Tensor]) -> None:
        """New lists of one layer; the newly kept neurons are added to `changed`."""
        scores = self.scores(layer, slots)
        for i, slot in enumerate(slots):
            assert slot.keep is not None
            if self.method.selection == "threshold":
                kept = keep_above_mean(scores[i])
                slot.keep[number] = kept.shape[0]
            else:
                kept = keep_top(scores[i], slot.keep[number])
            changed[i] = changed[i] + layer.selection.write(
                slot.id, kept, None if slot.former is None else slot.former[number]
            ).to(self.counters.device)
        if layer.selection.has_compensation:
            self._compensate(layer, slots)

    def scores(self, layer: LayerRun, slots: Sequence[Slot]) -> Tensor:
        """The scorer's scores of a layer's neurons for these slots, float32 [slots, I]."""
        rows = self._ids(slots)[layer.trace.device]
        inputs: dict[str, Any] = {}
        for name in self.scorer.inputs:
            if name == NOISE:
                inputs[name] = torch.stack([self._draw(layer, slot) for slot in slots])
            elif name == LAYER:
                inputs[name] = layer.layer.index
            elif name in WEIGHT_FACTS:
                inputs[name] = self._facts(layer, name)
            else:
                inputs[name] = layer.trace.tensors()[name].index_select(0, rows)
        return self.scorer.function(**inputs).to(layer.trace.device).expand(len(slots), -1)

    def _draw(self, layer: LayerRun, slot: Slot) -> Tensor:
        seed = hash((self.method.seed, slot.noise_seed or 0, layer.layer.index)) % (1 << 62)
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.rand(layer.layer.neurons, generator=generator, dtype=torch.float32, device="cpu")
        return noise.to(layer.trace.device)

    def _compensate(self, layer: LayerRun, slots: Sequence[Slot]) -> None:
        rows = self._ids(slots)[layer.trace.device]
        mean = layer.trace.tensors()["total"][rows] / layer.trace.tokens[rows].clamp_min(1)[:, None]
        dropped = mean.masked_fill(layer.selection.rows_mask(rows), 0.0)
        down = layer.layer.projected
        probe = dropped.to(layer.place[1])
        nothing = torch.zeros_like(probe[:1])
        # through the module, so that any kind of layer works; its bias is taken out again
        layer.selection.compensation[rows] = (down(probe) - down(nothing)).float()


def _overhead(layers: Sequence[LayerRun]) -> float:
    """Share of all FFN weights that a token selector reads beside them, so that the budget must leave it out too."""
    whole = sum(layer.layer.weights for layer in layers)
    return sum(layer.fixed_share * layer.layer.weights for layer in layers) / whole
