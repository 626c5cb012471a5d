"""The forward proxy: blocks against the whole product, and its cache on disk."""

from __future__ import annotations

import warnings

import pytest
import torch

import dartprune.model.proxy as proxy
from dartprune.cache import cache_folder
from dartprune.model.proxy import cached_forward_proxy, forward_proxy, forward_proxy_flops


@pytest.fixture
def counted(monkeypatch):
    """How often a proxy was worked out."""
    calls = []

    def count(*weights):
        calls.append(1)
        return forward_proxy(*weights)

    monkeypatch.setattr(proxy, "forward_proxy", count)
    return calls


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("block", [1, 40, 11 * 36, 11 * 37, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_the_whole_product(monkeypatch, block, dtype):
    down, unembedding = torch.randn(11, 8).to(dtype), torch.randn(37, 8).to(dtype)
    whole = (down.double() @ unembedding.double().t()).abs()
    monkeypatch.setattr(proxy, "BLOCK", block)
    highest, mean = forward_proxy(down, unembedding)
    assert highest.dtype is mean.dtype is torch.float32
    torch.testing.assert_close(highest, whole.amax(1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, whole.mean(1).float(), rtol=1e-5, atol=1e-6)


def test_a_view_by_rows_and_weights_that_are_trained():
    weight = torch.nn.Parameter(torch.randn(8, 11))  # a Linear's [H, I]
    unembedding = torch.nn.Parameter(torch.randn(37, 8))
    highest, mean = forward_proxy(weight.t(), unembedding)
    torch.testing.assert_close(highest, (weight.t() @ unembedding.t()).detach().abs().amax(1))
    assert not highest.requires_grad and not mean.requires_grad, "blocks would be held for a backward pass"


def test_no_block_is_larger_than_said(monkeypatch):
    largest = 0

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    down, unembedding = torch.randn(16, 4), torch.randn(1000, 4)
    monkeypatch.setattr(proxy, "BLOCK", 160)
    with Watched():
        forward_proxy(down, unembedding)
    assert 0 < largest <= 160


def test_estimate():
    assert forward_proxy_flops(11, 8, 37) == 2 * 11 * 8 * 37


def test_cache_hits(tmp_path, counted):
    down, unembedding = torch.randn(11, 8), torch.randn(37, 8).bfloat16()
    first = cached_forward_proxy(down, unembedding, tmp_path / "new")
    assert same(first, cached_forward_proxy(down.clone(), unembedding, tmp_path / "new"))
    assert same(first, forward_proxy(down, unembedding))
    # the same numbers in another layout are the same weights
    assert same(first, cached_forward_proxy(down.t().contiguous().t(), unembedding, tmp_path / "new"))
    assert len(counted) == 1
    assert len(list((tmp_path / "new").iterdir())) == 1, "nothing half-written is left behind"


def test_cache_misses_when_any_weight_changes(tmp_path, counted):
    down, unembedding = torch.randn(11, 8), torch.randn(37, 8)
    cached_forward_proxy(down, unembedding, tmp_path)
    other_down, other_unembedding = down.clone(), unembedding.clone()
    other_down[10, 7] += 1e-3
    other_unembedding[36, 7] += 1e-3
    changed = [
        (other_down, unembedding),
        (down, other_unembedding),
        (down.bfloat16(), unembedding),
        (down[:10], unembedding),
        (unembedding, down),
    ]
    for weights in changed:
        assert same(cached_forward_proxy(*weights, tmp_path), forward_proxy(*weights))
    assert len(counted) == len(list(tmp_path.iterdir())) == 1 + len(changed)


def test_the_same_bytes_in_another_shape_or_dtype_are_other_weights(tmp_path, counted):
    rows = torch.randn(5, 4)
    for weights in ((rows[:2], rows[2:]), (rows[:3], rows[3:]), (rows[:2].half(), rows.half())):
        cached_forward_proxy(*weights, tmp_path)
    cached_forward_proxy(rows[:2].half().view(torch.bfloat16), rows.half(), tmp_path)
    assert len(counted) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b"broken", b"\xff" * 200, None])
def test_a_broken_file_is_made_anew_with_a_warning(tmp_path, counted, content):
    down, unembedding = torch.randn(11, 8), torch.randn(37, 8)
    first = cached_forward_proxy(down, unembedding, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    with pytest.warns(UserWarning, match="cannot be read .* it is worked out again"):
        assert same(first, cached_forward_proxy(down, unembedding, tmp_path))
    assert same(first, cached_forward_proxy(down, unembedding, tmp_path))
    assert len(counted) == 2, "the new file serves again"


def test_a_file_without_the_right_tensors_is_made_anew(tmp_path):
    from safetensors.torch import save_file

    down, unembedding = torch.randn(11, 8), torch.randn(37, 8)
    first = cached_forward_proxy(down, unembedding, tmp_path)
    (path,) = tmp_path.iterdir()
    save_file({"max": torch.ones(11)}, path)
    with pytest.warns(UserWarning, match="worked out again"):
        assert same(first, cached_forward_proxy(down, unembedding, tmp_path))


def test_a_folder_that_cannot_be_made_costs_only_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    down, unembedding = torch.randn(11, 8), torch.randn(37, 8)
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert same(cached_forward_proxy(down, unembedding, tmp_path / "file"), forward_proxy(down, unembedding))


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DARTPRUNE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached_forward_proxy(torch.randn(3, 2), torch.randn(5, 2))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.delenv("DARTPRUNE_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "dartprune")
