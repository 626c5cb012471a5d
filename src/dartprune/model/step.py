"""The rest of a decode step on the CPU while a run is attached: linear layers and attention of one token a line.

For one token torch's bf16 and fp16 products of small matrices take several times what reading the weights takes, and
transformers' attention a dozen operators. Both are done here by kernels; whatever does not fit, and every forward of
more tokens, goes on to what was there before.
"""

from __future__ import annotations

import importlib.util
import weakref
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn

from dartprune.model.calls import StandIn, replaced
from dartprune.model.layer_site import Patch, Refuses

FEW = 4  # tokens of one call that the row kernel serves; torch's products are as quick for more
SMALL = 1 << 17  # weight bytes under which a second thread costs more than it saves
HALVES = (torch.bfloat16, torch.float16)
# attention of Llama's kind: q, k, v and o as linear layers, whole heads turned by halves, perhaps a norm for each head
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ATTENTIONS = {f"transformers.models.{key}.modeling_{key}.{name}Attention" for key, name in _FAMILIES.items()}
NORMS = {f"transformers.models.{key}.modeling_{key}.{name}RMSNorm" for key, name in _FAMILIES.items()}


class OwnLinear(StandIn, Refuses):
    """The forward of one linear layer: few inputs by the row kernel, others as before."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.patch: Patch | None = None

    @property
    def in_use(self) -> bool:
        """Whether it stands in for the module's forward now."""
        return self.patch is not None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output of x [..., K]."""
        patch = self.patch
        if patch is None:
            return type(self.module).forward(self.module, x)
        assert patch.original is not None
        weight, bias = self.module.weight, self.module.bias
        if not _fits(x, weight):
            out: Tensor = patch.original(x)
            return out
        return _linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and weight.is_cpu and weight.is_contiguous() and _is_few(x)


def _is_few(x: Tensor) -> bool:
    """Whether these are few tokens [..., H] of a 16-bit dtype on the CPU, with nothing to be recorded."""
    return x.dtype in HALVES and x.is_cpu and 0 < x.numel() <= FEW * x.shape[-1] and _plain_mode()


def _plain_mode() -> bool:
    """Whether no graph is traced, no gradient kept and no other dtype asked for."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import floats, words
    from dartprune.ffn.cpu.threads import use_threads

    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], weight.shape[0], dtype=torch.float32, device="cpu")
    given = flat.float().numpy(), words("weight", weight), floats(bias)
    threads = 1 if weight.numel() * 2 < SMALL else use_threads()
    if threads == 1:
        kernels.linear_alone(*given, out.numpy())
    else:
        kernels.linear(*given, threads, out.numpy())
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


class OwnNorm(StandIn, Refuses):
    """The forward of one RMS norm: few tokens by a kernel, others as before."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.patch: Patch | None = None

    @property
    def in_use(self) -> bool:
        """Whether it stands in for the module's forward now."""
        return self.patch is not None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm of x [..., H]."""
        patch, module = self.patch, self.module
        if patch is None:
            before: Tensor = type(module).forward(module, hidden_states)
            return before
        assert patch.original is not None
        weight = module.weight
        if weight.dtype != hidden_states.dtype or not _is_few(hidden_states):
            before = patch.original(hidden_states)
            return before
        return _normed(hidden_states, weight, module.variance_epsilon)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import floats

    wide = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    kernels.norm(wide.view(-1, x.shape[-1]).numpy(), floats(weight), epsilon)
    return wide.to(x.dtype)


class OwnAttention(StandIn, Refuses):
    """The forward of one attention module: one token a line on a growing cache by kernels, all else as before."""

    def __init__(self, module: Any, shared: ForwardInputs) -> None:
        self.module = module
        self.shared = shared
        self.patch: Patch | None = None

    @property
    def in_use(self) -> bool:
        """Whether it stands in for the module's forward now."""
        return self.patch is not None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the module's own forward gives."""
        patch = self.patch
        call = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if patch is None:
            given: tuple[Tensor, Tensor | None] = type(self.module).forward(self.module, hidden_states, **call)
            return given
        assert patch.original is not None
        if position_embeddings is None or not self._fits(hidden_states, attention_mask, past_key_values, kwargs):
            before: tuple[Tensor, Tensor | None] = patch.original(hidden_states, **call)
            return before
        return self._attend(hidden_states, position_embeddings, attention_mask, past_key_values), None

    def _fits(self, x: Tensor, mask: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> bool:
        module = self.module
        layers = getattr(cache, "layers", None)
        if x.dim() != 3 or x.shape[1] != 1 or x.dtype not in HALVES or x.device.type != "cpu" or not layers:
            return False
        if not (mask is None or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)):
            return False
        if kwargs.get("output_attentions") or module.config._attn_implementation != "sdpa" or not _plain_mode():
            return False
        held: Any = layers[module.layer_idx] if module.layer_idx < len(layers) else None
        return type(held).__name__ == "DynamicLayer" and bool(held.is_initialized) and held.keys.dtype == x.dtype

    def _attend(self, x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        from dartprune.ffn.cpu import step_kernels as kernels
        from dartprune.ffn.cpu.arrays import floats, words
        from dartprune.ffn.cpu.threads import use_threads

        module, lines, size = self.module, x.shape[0], self.module.head_dim
        cos, sin = self.shared.of(positions, lines)
        query = module.q_proj(x).view(lines, -1).float()
        key = module.k_proj(x).view(lines, -1).float()
        value = module.v_proj(x).view(lines, -1, 1, size)
        for part, norm in ((query, getattr(module, "q_norm", None)), (key, getattr(module, "k_norm", None))):
            weight = None if norm is None else norm.weight
            epsilon = 0.0 if norm is None else norm.variance_epsilon
            kernels.turn(part.numpy(), part.shape[1] // size, floats(weight), epsilon, cos, sin)
        keys, values = appended(
            cache.layers[module.layer_idx], key.view(lines, -1, 1, size).to(x.dtype), value.to(x.dtype)
        )
        out = torch.empty_like(query)
        work = lines * query.shape[1] * keys.shape[2]
        use_threads(1 if work < SMALL else None)
        added = self.shared.added(mask, lines, keys.shape[2])
        kernels.attend(query.numpy(), words("keys", keys), words("values", values), added, module.scaling, out.numpy())
        result: Tensor = module.o_proj(out.to(x.dtype).view(lines, 1, -1))
        return result


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


def appended(layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, T + 1, D] of a cache's layer after one more token [B, heads, 1, D].

    The layer's tensors become views of larger ones with room for tokens to come, so that a step does not copy all
    that went before. What else is done to the cache (crops, reorders, copies) works on views as on other tensors; where
    its tensors are not the views that were left here, they are copied into new room.
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
    for whole, new in zip(room, (key, value), strict=True):
        whole[:, :, length : length + 1] = new
    layer.keys, layer.values = room[0][:, :, : length + 1], room[1][:, :, : length + 1]
    return layer.keys, layer.values


def _is_view(part: Tensor, whole: Tensor) -> bool:
    """Whether `part` is the beginning of every head of `whole`, with room behind it."""
    return (
        part.data_ptr() == whole.data_ptr()
        and part.stride() == whole.stride()
        and part.shape[:2] == whole.shape[:2]
        and part.shape[2] < whole.shape[2]
    )


Own: TypeAlias = "OwnLinear | OwnNorm | OwnAttention"


class OwnStep:
    """Everything of a model that is computed here while a run is attached."""

    def __init__(self, modules: list[Any]) -> None:
        """Set up for these modules; nothing is changed yet."""
        self.shared = ForwardInputs()
        self._parts: list[Own] = []
        for module in modules:
            if type(module) is nn.Linear:
                self._parts.append(OwnLinear(module))
            elif _name(module) in NORMS:
                self._parts.append(OwnNorm(module))
            else:
                self._parts.append(OwnAttention(module, self.shared))

    def fits(self, modules: list[Any]) -> bool:
        """Whether it was made for the very same modules."""
        return [part.module for part in self._parts] == modules

    @property
    def said(self) -> str:
        """What is computed here, for the report."""
        attentions = sum(isinstance(part, OwnAttention) for part in self._parts)
        linears = sum(isinstance(part, OwnLinear) for part in self._parts)
        if not self._parts:
            return "transformers' own"
        parts = [f"{attentions} attention layers"] * bool(attentions) + [f"{linears} linear layers"] * bool(linears)
        return f"{' and '.join(parts)} by kernels"

    def prepare(self) -> None:
        """Compile the kernels, so that no token waits for it."""
        if not self._parts:
            return
        from dartprune.ffn.cpu import step_kernels as kernels
        from dartprune.ffn.cpu.arrays import words
        from dartprune.ffn.cpu.threads import kept_threads, use_threads

        nothing, x = numpy.empty(0, numpy.float32), numpy.zeros((1, 64), numpy.float32)
        with kept_threads():
            for dtype in {part.module.weight.dtype for part in self._parts if isinstance(part, OwnLinear)}:
                weight, out = (
                    words("weight", torch.zeros(4, 64, dtype=dtype, device="cpu")),
                    numpy.empty((1, 4), numpy.float32),
                )
                kernels.linear_alone(x, weight, nothing, out)
                kernels.linear(x, weight, nothing, use_threads(), out)
            if any(isinstance(part, (OwnNorm, OwnAttention)) for part in self._parts):
                kernels.norm(x, x[0], 1e-6)
                kernels.turn(x, 1, nothing, 0.0, x, x)
                keys = words("keys", torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16, device="cpu")[:, :, :4])
                kernels.attend(x, keys, keys, numpy.empty((1, 0), numpy.float32), 1.0, x.copy())

    def install(self) -> None:
        """Put them in place."""
        for part in self._parts:
            part.patch = Patch(part.module, "forward")
            part.patch.install(part.forward)

    def remove(self) -> list[str]:
        """Put back what was there; returns the modules that somebody else has patched meanwhile."""
        kept = []
        for part in reversed(self._parts):
            if part.patch is not None and not part.patch.remove():
                kept.append(f"the forward of a {type(part.module).__name__}")
            part.patch = None
        self.shared.forget()
        return kept


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _modules(core: Any) -> list[nn.Module]:
    """The modules of a model that can be computed here."""
    if importlib.util.find_spec("numba") is None or getattr(core, "dtype", None) not in HALVES:
        return []
    return [module for module in core.modules() if _is_taken(module) and not replaced(module)]


def _is_taken(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return module.weight.dtype in HALVES and module.weight.device.type == "cpu"
    return _name(module) in ATTENTIONS or _name(module) in NORMS


# torch.compile guards on the forwards, so a model that is attached again gets the same ones
_steps: weakref.WeakKeyDictionary[nn.Module, OwnStep] = weakref.WeakKeyDictionary()


def own_step(core: nn.Module) -> OwnStep:
    """What can be computed here of a model, the same object at each attach as long as its modules are the same."""
    modules = _modules(core)
    step = _steps.get(core)
    if step is None or not step.fits(modules):
        step = _steps[core] = OwnStep(modules)
    return step
