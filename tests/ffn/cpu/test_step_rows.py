"""Attention of a decode step whose products are of rows of 4 bits, against plain torch on unpacked rows."""

from __future__ import annotations

import pytest
import torch

from dartprune.ffn.quantised import rounded_inputs

pytest.importorskip("numba")


def normed(x, weight, epsilon):
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin[:, None]


@pytest.mark.parametrize("seed", range(24))
def test_attention_over_rows_is_what_the_unpacked_weights_give(seed):
    from dartprune.ffn.cpu import step_rows
    from dartprune.ffn.cpu.arrays import words
    from dartprune.ffn.cpu.threads import use_threads
    from dartprune.model.packed_rows import RowProjection, lone_rows

    torch.manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), ()))]

    dtype, lines, length = pick(torch.bfloat16, torch.float16), pick(1, 2, 5), pick(1, 7, 40)
    hidden, size, groups, many = pick(36, 128, 320), pick(8, 64), pick(1, 2, 3), pick(1, 2, 7)
    heads, epsilon = groups * many, 1e-6
    outputs = heads * size, groups * size, groups * size, hidden
    inputs = hidden, hidden, hidden, heads * size
    biased, with_norms, masked = (pick(True, False) for _ in range(3))
    layers = [
        RowProjection(
            lone_rows(torch.randn(o, i).to(dtype) / i**0.5), "up", torch.randn(o).to(dtype) if biased else None
        )
        for o, i in zip(outputs, inputs, strict=True)
    ]
    x, nothing = torch.randn(lines, hidden).to(dtype), torch.empty(0, dtype=dtype)
    norms = [torch.randn(size).to(dtype) if with_norms else nothing for _ in range(2)]
    cos, sin = torch.randn(lines, size), torch.randn(lines, size)
    keys, values = (torch.randn(lines, groups, length + 5, size).to(dtype) for _ in range(2))
    mask = torch.zeros(lines, length + 1)
    if masked:
        mask[0, : length // 2] = -torch.inf
    out = torch.empty(lines, hidden, dtype=dtype)
    before = keys.clone(), values.clone()
    step_rows.attention_of_rows(
        words("x", x),
        tuple(layer.head.numpy() for layer in layers),
        (layers[0].layout.offsets, layers[3].layout.offsets),
        tuple(words("bias", nothing if layer.bias is None else layer.bias) for layer in layers),
        (*(words("norm", norm) for norm in norms), epsilon),
        cos.numpy(), sin.numpy(), words("keys", keys), words("values", values), length,
        mask.numpy() if masked else mask[:, :0].numpy(), size**-0.5, use_threads(), words("out", out),
    )  # fmt: skip

    def product(given, layer):
        made = rounded_inputs(given) @ layer.rows().unpacked("up", dtype=torch.float32).t()
        return made if layer.bias is None else made + layer.bias.float()

    query, key, value = (product(x, layer).view(lines, -1, size) for layer in layers[:3])
    if with_norms:
        query, key = normed(query, norms[0].float(), epsilon), normed(key, norms[1].float(), epsilon)
    query, key = turned(query, cos, sin), turned(key, cos, sin)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    for cache, old, new in ((keys, before[0], key), (values, before[1], value)):
        torch.testing.assert_close(cache[:, :, length].float(), new, rtol=rounding, atol=5e-3)
        assert torch.equal(cache[:, :, :length], old[:, :, :length])
        assert torch.equal(cache[:, :, length + 1 :], old[:, :, length + 1 :])
    held = [part[:, :, : length + 1].float().repeat_interleave(many, 1) for part in (keys, values)]
    scores = torch.einsum("nhd,nhtd->nht", query, held[0]) * size**-0.5 + mask[:, None]
    found = torch.einsum("nht,nhtd->nhd", scores.softmax(-1), held[1]).flatten(1)
    want = product(found, layers[3])
    # a sum that lies between two codes may be rounded either way
    assert (out.float() - want).abs().max() < 0.02 * max(1.0, float(want.abs().max()))
