"""Attention of a decode step by kernels: one token a line, on a cache that grows in place."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dartprune.model.caches import cache_in
from dartprune.model.packed_rows import FEW, RowProjection
from dartprune.model.step_parts import HALVES, SMALL, OwnModule, StepMode, plain_mode, untouched

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class OwnAttention(OwnModule):
    """The forward of one attention module: one token a line on a growing cache by kernels, all else as before."""

    def __init__(self, module: Any, mode: StepMode, shared: ForwardInputs) -> None:
        super().__init__(module, mode)
        self.shared = shared

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the module's own forward gives."""
        mask, cache = attention_mask, cache_in(kwargs)
        if self.in_use and self._fits(hidden_states, position_embeddings, mask, cache, kwargs):
            assert position_embeddings is not None
            return self._attend(hidden_states, position_embeddings, mask, cache), None
        call = {"position_embeddings": position_embeddings, "attention_mask": mask, **kwargs}
        out: tuple[Tensor, Tensor | None] = self.before(hidden_states, **call)
        return out

    def _fits(
        self,
        x: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> bool:
        module = self.module
        if not all(norm is None or (untouched(norm) and norm.weight.dtype == x.dtype) for norm in self._norms()):
            return False
        layers = getattr(cache, "layers", None)
        if not layers or not attends(module, x, positions, mask, kwargs):
            return False
        return module.layer_idx < len(layers) and may_grow(layers[module.layer_idx], x)

    def _attend(self, x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        from dartprune.ffn.cpu import step_kernels, step_rows
        from dartprune.ffn.cpu.arrays import words
        from dartprune.ffn.cpu.threads import use_threads

        module, lines, layer = self.module, x.shape[0], cache.layers[self.module.layer_idx]
        length, norms = layer.keys.shape[2], self._norms()
        epsilon = 0.0 if norms[0] is None else norms[0].variance_epsilon
        parts = [module._modules[name] for name in PRODUCTS]
        weights = self._weights(parts, x)
        *known, query_norm, key_norm = self.views.of(
            [*weights, *(None if norm is None else norm.weight for norm in norms)], x.dtype
        )
        if not weights:
            # others may return more
            given = [part(x).reshape(lines, -1).to(x.dtype).contiguous() for part in parts[:-1]]
        room = (words("cache", part) for part in grown(layer))
        added = self.shared.added(mask, lines, length + 1)
        scaled = query_norm, key_norm, epsilon
        work = scaled, *self.shared.of(positions, lines), *room, length, added, module.scaling
        if weights:
            out = torch.empty(lines, 1, parts[-1].out_features, dtype=x.dtype, device="cpu")
            flat, result = (words("token", part.view(lines, -1)) for part in (x.contiguous(), out))
            products, biases, threads = tuple(known[:4]), tuple(known[4:]), use_threads()
            if isinstance(parts[0], RowProjection):
                formats = parts[0].layout.offsets, parts[-1].layout.offsets
                step_rows.attention_of_rows(flat, products, formats, biases, *work, threads, result)
            else:
                step_kernels.attention(flat, products, biases, *work, threads, result)
            return out
        heads = torch.empty_like(given[0])
        use_threads(1 if heads.numel() * length < SMALL else None)
        step_kernels.attend(*(words("input", part) for part in given), *work, words("output", heads))
        made: Tensor = parts[-1](heads.view(lines, 1, -1))
        return made

    def _norms(self) -> list[Any]:
        """The norms of queries and of keys, None for none."""
        return [self.module._modules.get(name) for name in ("q_norm", "k_norm")]

    def _weights(self, parts: list[Any], x: Tensor) -> list[Tensor | None]:
        """Weights, then biases, of the four products, where one kernel can do the whole; else nothing.

        They must be nobody else's business, and either all ordinary or all rows of 4 bits.
        """
        if not all(map(untouched, parts)):
            return []
        if all(type(part) is nn.Linear for part in parts):
            weights = [part.weight for part in parts]
            fit = all(part.dtype == x.dtype and part.is_contiguous() and part.is_cpu for part in weights)
        else:
            fit = x.shape[0] <= FEW and all(type(part) is RowProjection and part.is_alone for part in parts)
            weights = [part.head for part in parts] if fit else []
        biases = [part.bias for part in parts] if fit else []
        return [*weights, *biases] if fit and all(b is None or b.dtype == x.dtype for b in biases) else []


def attends(
    module: Any, x: Tensor, positions: tuple[Tensor, Tensor] | None, mask: Tensor | None, call: dict[str, Any]
) -> bool:
    """Whether the kernels compute an attention module's forward, but for its cache."""
    if positions is None or positions[0].shape[-1] != module.head_dim:
        return False
    if x.dim() != 3 or x.shape[1] != 1 or x.dtype not in HALVES or x.device.type != "cpu":
        return False
    if not (mask is None or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)):
        return False
    return not call.get("output_attentions") and module.config._attn_implementation == "sdpa" and plain_mode()


def may_grow(layer: Any, x: Tensor) -> bool:
    """Whether a cache's layer is one that `grown` knows, for lines like these."""
    known = type(layer).__name__ == "DynamicLayer" and bool(layer.is_initialized)
    return known and layer.keys.dtype == x.dtype and layer.keys.shape[0] == x.shape[0]


class ForwardInputs:
    """Positions and masks of a forward as the kernels take them, made once for all layers."""

    def __init__(self) -> None:
        self._positions: tuple[Any, Any] | None = None
        self._turns: tuple[Any, Any] = (None, None)
        self._mask: Any = None
        self._added: Any = None

    def of(self, positions: tuple[Tensor, Tensor], lines: int) -> tuple[Any, Any]:
        """Cosines and sines, float32 [lines, D]."""
        held = self._positions
        if held is None or held[0] is not positions[0] or held[1] is not positions[1] or len(self._turns[0]) != lines:
            parts = [part.reshape(part.shape[0], -1).float().expand(lines, -1).contiguous() for part in positions]
            self._positions, self._turns = positions, (parts[0].numpy(), parts[1].numpy())
        return self._turns

    def added(self, mask: Tensor | None, lines: int, tokens: int) -> Any:
        """What is added to the scores of every line's tokens, float32 [lines, tokens]; [lines, 0] where nothing is."""
        if mask is None:
            return numpy.empty((lines, 0), numpy.float32)
        if self._mask is not mask:
            flat = mask.reshape(mask.shape[0], -1)[:, -tokens:].expand(lines, -1)
            if flat.dtype == torch.bool:
                flat = torch.zeros(flat.shape, dtype=torch.float32, device="cpu").masked_fill(~flat, -torch.inf)
            self._mask, self._added = mask, flat.float().contiguous().numpy()
        return self._added

    def forget(self) -> None:
        """Hold nothing of the last forward."""
        self._positions, self._mask = None, None


_ROOM = "_dartprune_room"


def grown(layer: Any) -> list[Tensor]:
    """Make room for one more token in a cache's layer; returns keys and values [B, heads, room, D].

    The layer's tensors become views of larger ones, one token longer than before, which the caller fills at
    [:, :, T], so that a step does not copy all that went before. What else is done to the cache (crops, reorders,
    copies) works on views as on other tensors; where its tensors are not the views that were left here, they are copied
    into new room. What is returned are the same tensors as long as the room is.
    """
    parts = layer.keys, layer.values
    room: list[Tensor]
    room, left = layer.__dict__.get(_ROOM, ([], (None, None)))
    length = parts[0].shape[2]
    # after a crop somebody may hold what was cut off: it is not written over
    known = (parts[0] is left[0] and parts[1] is left[1]) or all(map(_is_same, parts, left))
    if not known or length == room[0].shape[2]:
        capacity = length + max(64, length // 4)
        room = []
        for part in parts:
            whole = part.new_empty(*part.shape[:2], capacity, part.shape[3])
            whole[:, :, :length] = part
            room.append(whole)
    layer.keys, layer.values = (whole.narrow(2, 0, length + 1) for whole in room)
    layer.__dict__[_ROOM] = room, (layer.keys, layer.values)
    return room


def _is_same(part: Tensor, left: Tensor | None) -> bool:
    """Whether two tensors are the same memory seen in the same way."""
    if left is None or part.data_ptr() != left.data_ptr():
        return False
    return part.shape == left.shape and part.stride() == left.stride()
