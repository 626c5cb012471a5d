"""Makes masks: the first ones from the trace, new ones at an event from replayed inputs (DART sections 3.3 and 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dartprune.budget import DOWN_SQUARE, NEURON_LEVEL, BudgetFacts, keep_counts
from dartprune.errors import UserError
from dartprune.method import Method
from dartprune.runtime.device_values import DeviceValues
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.selection import choose
from dartprune.runtime.slot_tensors import Counters
from dartprune.runtime.slots import MaskCounts, Slot
from dartprune.runtime.trace import MeanImpact
from dartprune.runtime.weight_facts import WeightFacts
from dartprune.scoring import LAYER, NOISE, WEIGHT_FACTS, scorer


class Masks:
    """Builds and replays the masks of some slots, all layers at one token boundary."""

    def __init__(self, method: Method, layers: Sequence[LiveLayer], counters: Counters, facts: WeightFacts) -> None:
        """Set up.

        Args:
            method: what to do.
            layers: all layers.
            counters: where the share of the FFN that a slot leaves out is kept.
            facts: of the weights, for scorers and budgets.

        Raises:
            ValueError: a token selector alone reads more than the sparsity allows.
        """
        self.method = method
        self.layers = layers
        self.counters = counters
        self.scorer = scorer(method.scorer)
        self.selectors = [layer.selector for layer in layers if layer.selector is not None]
        self._size = sum(layer.size for layer in layers)
        # what a selector reads beside the weights is left out of them
        self.overhead = overhead = sum(layer.fixed_share * layer.size for layer in layers) / self._size
        if method.sparsity + overhead >= 1:
            raise UserError(
                f"{method.name}: sparsity {method.sparsity:g} cannot be reached: the sketch alone reads "
                f"{overhead:.3f} of the FFN's bytes; use fewer bits or a lower sparsity"
            )
        self.flops = 0
        self.replays = 0
        self.version = 0  # counts changes of any mask
        for layer in layers:
            if layer.selector is not None and layer.selector.learns:
                layer.selector.expect(self._shares(layer, method.sparsity + overhead)[1])
        self._facts = facts
        self._on_device = DeviceValues()

    # ---- the ways to a mask

    def build(self, slots: Sequence[Slot]) -> list[Tensor]:
        """New budgets and masks from the traces; returns the number of newly kept neurons of each slot."""
        for slot, facts in zip(slots, self._budget_facts(slots), strict=True):
            asked = self.method.sparsity if slot.sparsity is None else slot.sparsity
            pruned = self.method.budget.pruned(facts, asked + self.overhead)
            slot.masks.former = slot.masks.keep or slot.masks.former
            slot.masks.keep = keep_counts(pruned, facts.neurons)
            self._split(slot, pruned)
        return self._choose(slots)

    def replay(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Renew the statistics from the buffered inputs and choose anew within the budgets in force."""
        self.replays += 1
        length = self.method.refresh.replay_tokens
        order = torch.arange(length, dtype=torch.int64, device="cpu")
        places = torch.stack([(slot.ring.next - length + order) % length for slot in slots])
        # a young sequence has not filled its ring: the oldest places do not count yet
        weight = torch.stack([(order >= length - slot.ring.filled).float() for slot in slots])
        ids = self._ids(slots)
        on = {device: (rows, places.to(device), weight.to(device)) for device, rows in ids.items()}
        for layer in self.layers:
            assert layer.ring is not None
            rows, where, counted = on[layer.ring.rings.device]
            x, memory = layer.ring.read(rows, where), self.method.refresh.replay_memory
            if layer.selector is not None and layer.selector.learns:
                layer.selector.learn(layer.selector.lesson(x, counted, rows), rows, counted, memory)
            if layer.trace.statistics:
                layer.trace.blend(layer.parts.activations(x), rows, counted, memory)
            self.flops += 2 * (layer.parts.matrices - 1) * layer.neurons * layer.parts.hidden * length * len(slots)
        for slot in slots:
            slot.masks.former = list(slot.masks.keep) if slot.masks.keep is not None else None
        return self._choose(slots)

    def drop(self, slots: Sequence[Slot]) -> None:
        """Every neuron again, in every layer."""
        self.version += 1
        rows = [slot.id for slot in slots]
        for layer in self.layers:
            layer.selection.open(rows)
        for slot in slots:
            self.counters.share[slot.id] = 0.0
            slot.masks = MaskCounts(former=slot.masks.keep)

    def forget(self, slots: Sequence[Slot]) -> None:
        """Start the traces of these slots from nothing."""
        rows = [slot.id for slot in slots]
        for layer in self.layers:
            layer.trace.clear(rows)
            if layer.selector is not None and layer.selector.learns:
                layer.selector.clear(rows)

    # ---- budget

    def _budget_facts(self, slots: Sequence[Slot]) -> list[BudgetFacts]:
        """What the budget may look at, of each slot."""
        ids = self._ids(slots)
        sums = [layer.trace.impact.index_select(0, ids[layer.trace.device]) for layer in self.layers]
        # the budget is made on the host: one transfer for all layers
        impact = torch.stack([part.to(self.counters.device) for part in sums], dim=1).cpu().double()
        neurons = [layer.neurons for layer in self.layers]
        found = []
        for slot, mean in zip(slots, map(MeanImpact.of, impact), strict=True):
            facts = BudgetFacts(mean.angle.float(), mean.change.float(), neurons)
            if set(NEURON_LEVEL) <= set(self.method.budget.inputs):
                facts = replace(facts, contributions=self._contributions(slot, mean.stream))
            found.append(facts)
        return found

    def _contributions(self, slot: Slot, stream: Tensor) -> list[Tensor]:
        """What each neuron adds to the residual stream of a slot, of the stream's square [L] there."""
        out = []
        for layer, square in zip(self.layers, stream.tolist(), strict=True):
            factor = float(self._facts(layer, DOWN_SQUARE)) / max(square, 1e-30)
            out.append((layer.trace.tensors()["energy"][slot.id] * factor).to(self.counters.device))
        return out

    def _split(self, slot: Slot, pruned: Tensor) -> None:
        """With a token selector, what the budget leaves is candidates and neurons for each token."""
        if self.method.token is None:
            return
        found = [self._shares(layer, float(p)) for layer, p in zip(self.layers, pruned.tolist(), strict=True)]
        slot.masks.keep = [candidates for candidates, _ in found]
        slot.masks.per_token = [per_token for _, per_token in found]
        for selector, count in zip(self.selectors, slot.masks.per_token, strict=True):
            selector.wanted[slot.id] = count

    def _shares(self, layer: LiveLayer, pruned: float) -> tuple[int, int]:
        """Candidates of a layer, and neurons for each token, where that share of its weights is left out."""
        assert self.method.token is not None and layer.selector is not None
        rows = (1 - pruned) * layer.neurons
        candidates, chosen = self.method.token.split(rows, layer.neurons, gated=layer.parts.gated)
        return candidates, min(candidates, round(chosen / layer.selector.chosen_cost))

    def expect(self, slot: Slot) -> None:
        """Tell the selectors how many neurons this sequence's tokens will want, of the sparsity it asked for."""
        asked = self.method.sparsity if slot.sparsity is None else slot.sparsity
        for layer in self.layers:
            if layer.selector is not None and layer.selector.learns:
                layer.selector.wanted[slot.id] = self._shares(layer, asked + self.overhead)[1]

    # ---- score and selection

    def _choose(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Write what the scores name into every layer's selection; the newly kept neurons of each slot."""
        self.version += 1
        changed = [torch.zeros((), dtype=torch.int64, device=self.counters.device) for _ in slots]
        left_out = [0.0] * len(slots)
        for number, layer in enumerate(self.layers):
            if layer.selection.everything:
                layer.selection.write_all([slot.id for slot in slots])
            else:
                self._write(number, layer, slots, changed)
            for i, slot in enumerate(slots):
                left_out[i] += layer.size * (1 - self._fixed_share(number, layer, slot))
        for slot, left in zip(slots, left_out, strict=True):
            self.counters.share[slot.id] = left / self._size
        return changed

    def _write(self, number: int, layer: LiveLayer, slots: Sequence[Slot], changed: list[Tensor]) -> None:
        """New lists of one layer; the newly kept neurons are added to `changed`."""
        scores = self.scores(layer, slots)
        for i, slot in enumerate(slots):
            masks = slot.masks
            assert masks.keep is not None
            neurons = choose(scores[i], masks.keep[number], self.method.selection)
            masks.keep[number] = neurons.shape[0]
            former = None if masks.former is None else masks.former[number]
            changed[i] = changed[i] + layer.selection.write(slot.id, neurons, former).to(self.counters.device)
        if layer.selection.has_compensation:
            self._compensate(layer, slots)

    def scores(self, layer: LiveLayer, slots: Sequence[Slot]) -> Tensor:
        """The scorer's scores of a layer's neurons for these slots, float32 [slots, I]."""
        rows = self._ids(slots)[layer.trace.device]
        inputs: dict[str, Any] = {}
        for name in self.scorer.inputs:
            if name == NOISE:
                inputs[name] = torch.stack([self._noise(layer, slot) for slot in slots])
            elif name == LAYER:
                inputs[name] = layer.index
            elif name in WEIGHT_FACTS:
                inputs[name] = self._facts(layer, name)
            else:
                inputs[name] = layer.trace.tensors()[name].index_select(0, rows)
        return self.scorer.function(**inputs).to(layer.trace.device).expand(len(slots), -1)

    def _noise(self, layer: LiveLayer, slot: Slot) -> Tensor:
        """Uniform random numbers that belong to a sequence and a layer, float32 [I]."""
        seed = hash((self.method.seed, slot.noise_seed or 0, layer.index)) % (1 << 62)
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.rand(layer.neurons, generator=generator, dtype=torch.float32, device="cpu")
        return noise.to(layer.trace.device)

    def _compensate(self, layer: LiveLayer, slots: Sequence[Slot]) -> None:
        """What the dropped neurons give on average (FLAP, arXiv 2312.11983), for each slot."""
        rows = self._ids(slots)[layer.trace.device]
        mean = layer.trace.tensors()["total"][rows] / layer.trace.tokens[rows].clamp_min(1)[:, None]
        dropped = mean.masked_fill(layer.selection.rows_mask(rows), 0.0)
        layer.selection.compensation[rows] = layer.parts.given(dropped.to(layer.place[1]))

    def _ids(self, slots: Sequence[Slot]) -> dict[torch.device, Tensor]:
        """The ids of these slots on each device, copied there once for all layers."""
        ids = [slot.id for slot in slots]
        return {device: self._on_device(ids, device) for device in {layer.trace.device for layer in self.layers}}

    def _fixed_share(self, number: int, layer: LiveLayer, slot: Slot) -> float:
        """Share of a layer's weights that every token of a slot uses, whatever it chooses for itself."""
        assert slot.masks.keep is not None
        if layer.selector is not None:
            return layer.selector.fixed_share(slot.masks.keep[number])
        return slot.masks.keep[number] / layer.neurons
