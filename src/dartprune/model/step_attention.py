"""Attention of a decode step by kernels: one token a line, on a cache that grows in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dartprune.model.caches import cache_in
from dartprune.model.step_parts import HALVES, SMALL, OwnModule, StepMode, plain_mode, untouched


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
        if (
            self.in_use
            and position_embeddings is not None
            and self._fits(hidden_states, position_embeddings, mask, cache, kwargs)
        ):
            return self._attend(hidden_states, position_embeddings, mask, cache), None
        call = {"position_embeddings": position_embeddings, "attention_mask": mask, **kwargs}
        out: tuple[Tensor, Tensor | None] = self.before(hidden_states, **call)
        return out

    def _fits(
        self, x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> bool:
        module = self.module
        norms = [norm for norm in self._norms() if norm is not None]
        if positions[0].shape[-1] != module.head_dim or not all(
            untouched(norm) and norm.weight.dtype == x.dtype for norm in norms
        ):
            return False
        layers = getattr(cache, "layers", None)
        if x.dim() != 3 or x.shape[1] != 1 or x.dtype not in HALVES or x.device.type != "cpu" or not layers:
            return False
        if not (mask is None or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)):
            return False
        if kwargs.get("output_attentions") or module.config._attn_implementation != "sdpa" or not plain_mode():
            return False
        held: Any = layers[module.layer_idx] if module.layer_idx < len(layers) else None
        known = type(held).__name__ == "DynamicLayer" and bool(held.is_initialized)
        return known and held.keys.dtype == x.dtype and held.keys.shape[0] == x.shape[0]

    def _attend(self, x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        from dartprune.ffn.cpu import step_kernels as kernels
        from dartprune.ffn.cpu.arrays import words
        from dartprune.ffn.cpu.threads import use_threads

        module, lines, layer = self.module, x.shape[0], cache.layers[self.module.layer_idx]
        length, whole = layer.keys.shape[2], self._plain(x.dtype)
        nothing = torch.empty(0, dtype=x.dtype, device="cpu")
        norms = self._norms()
        epsilon = 0.0 if norms[0] is None else norms[0].variance_epsilon
        scaled = *(words("norm", nothing if norm is None else norm.weight) for norm in norms), epsilon
        if not whole:
            products = (part(x) for part in (module.q_proj, module.k_proj, module.v_proj))
            given = [part.reshape(lines, -1).to(x.dtype).contiguous() for part in products]  # others may return more
        room = (words("cache", part) for part in grown(layer))
        work = scaled, *self.shared.of(positions, lines), *room, length, self.shared.added(mask, lines, length + 1)
        if whole:
            parts = (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
            weights = tuple(words("weight", part.weight) for part in parts)
            biases = tuple(words("bias", nothing if part.bias is None else part.bias) for part in parts)
            out = torch.empty(lines, module.o_proj.out_features, dtype=x.dtype, device="cpu")
            flat = words("input", x.reshape(lines, -1))
            kernels.attention(flat, weights, biases, *work, module.scaling, use_threads(), words("output", out))
            return out.view(lines, 1, -1)
        heads = torch.empty_like(given[0])
        use_threads(1 if heads.numel() * length < SMALL else None)
        kernels.attend(*(words("input", part) for part in given), *work, module.scaling, words("output", heads))
        result: Tensor = module.o_proj(heads.view(lines, 1, -1))
        return result

    def _norms(self) -> list[Any]:
        """The norms of queries and of keys, None for none."""
        return [getattr(self.module, name, None) for name in ("q_norm", "k_norm")]

    def _plain(self, dtype: torch.dtype) -> bool:
        """Whether all four products are nobody else's business: one kernel then does the whole."""
        module = self.module
        return all(_is_plain(part, dtype) for part in (module.q_proj, module.k_proj, module.v_proj, module.o_proj))


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    """Whether a module is an ordinary linear layer with weights of a dtype, and nothing around it."""
    if type(module) is not nn.Linear or not untouched(module):
        return False
    weight, bias = module.weight, module.bias
    return weight.dtype == dtype and weight.is_contiguous() and weight.is_cpu and (bias is None or bias.dtype == dtype)


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
            return torch.empty(lines, 0, dtype=torch.float32, device="cpu").numpy()
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
    into new room.
    """
    length, parts = layer.keys.shape[2], (layer.keys, layer.values)
    room, left = layer.__dict__.get(_ROOM, ((), 0))
    # after a crop somebody may hold what was cut off: it is not written over
    if left != length or not all(_is_view(part, whole) for part, whole in zip(parts, room, strict=True)):
        capacity = length + max(64, length // 4)
        room = []
        for part in parts:
            whole = part.new_empty(*part.shape[:2], capacity, part.shape[3])
            whole[:, :, :length] = part
            room.append(whole)
    layer.__dict__[_ROOM] = room, length + 1
    layer.keys, layer.values = room[0][:, :, : length + 1], room[1][:, :, : length + 1]
    return list(room)


def _is_view(part: Tensor, whole: Tensor) -> bool:
    """Whether `part` is the beginning of every head of `whole`, with room behind it."""
    return (
        part.data_ptr() == whole.data_ptr()
        and part.stride() == whole.stride()
        and part.shape[:2] == whole.shape[:2]
        and part.shape[2] < whole.shape[2]
    )
