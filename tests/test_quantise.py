"""`dartprune.quantise`: models in 4 and 8 bits, what is attached to them, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import dartprune
from dartprune.ffn.quantised import QuantisedRows, rounded_inputs
from dartprune.loading import load
from dartprune.model.caches import handed
from dartprune.model.families import describe
from dartprune.model.packed_bytes import ByteEmbedding, ByteLinear, bytes_of
from dartprune.model.packed_rows import FEW, VOCABULARY, RowEmbedding, RowProjection, lone_rows
from dartprune.model.sizes import count
from dartprune.model.weights import row_weights
from dartprune.packed_file import load_packed
from tiny import FAMILIES

pytest.importorskip("numba")
# more than the row kernels take at a time
IDS = torch.tensor([[5, 9, 77, 3, 64, 21, 12, 90, 45, 33, 2, 8, 41, 7, 19, 88, 60, 14, 71, 27]])


def quantised(family="llama", bits=4, **options):
    model = FAMILIES[family]()
    return model, dartprune.quantise(model, bits, **options)


def unpacked_twin(model, family):
    """An ordinary model with the weights that a quantised one computes with."""
    twin = FAMILIES[family]()
    pairs = zip(describe(model).layers, describe(twin).layers, strict=True)
    with torch.no_grad():
        for mine, other in pairs:
            rows = row_weights(mine)
            matrices = {"up": rows.up, "down": rows.down.t(), "gate": rows.gate}
            if other.fused:
                matrices["up"] = torch.cat((rows.gate, rows.up))
            for role in ("gate", "up", "down"):
                module = getattr(other, role)
                if module is not None:
                    given = matrices[role]
                    module.weight.copy_(given.t() if type(module).__name__ == "Conv1D" else given)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_many_inputs_are_multiplied_with_unpacked_rows_and_few_by_rows(dtype):
    layer = describe(quantised()[0]).layers[0]
    rows = row_weights(layer)
    for role in ("gate", "up", "down"):
        module, matrix = getattr(layer, role), getattr(rows, role).double()
        weight = matrix.t() if role == "down" else matrix
        x = torch.randn(FEW + 1, module.in_features, dtype=dtype)
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
        many = module(x)
        assert many.dtype == dtype
        torch.testing.assert_close(many.double(), x.double() @ weight.t(), rtol=tolerance, atol=tolerance)
        given = x.double() if role == "down" else rounded_inputs(x).double()
        few = max(tolerance, 1e-3)  # down's multipliers are rounded to 16 bits
        torch.testing.assert_close(module(x[:FEW]).double(), (given @ weight.t())[:FEW], rtol=few, atol=few)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("bits", [4, 8])
def test_every_family_computes_with_its_unpacked_weights(family, bits):
    model, done = quantised(family, bits, whole=False)
    assert done.bits == bits and done.bytes != done.bytes_before
    assert all(isinstance(row_weights(layer), QuantisedRows) for layer in describe(model).layers)
    twin = unpacked_twin(model, family)
    long = IDS.repeat(FEW // IDS.shape[1] + 1, 1)
    with torch.no_grad():
        many, exact = model(long).logits, twin(long).logits
        few = model(IDS[:, :2]).logits
        exact_few = twin(IDS[:, :2]).logits
    torch.testing.assert_close(many, exact, rtol=1e-3, atol=2e-3 * float(exact.abs().max()))
    # a few tokens go through the kernels, which round their inputs to 8 bits
    assert (few - exact_few).square().mean() < 0.01 * exact_few.square().mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_whole_model_is_near_what_it_was(bits):
    before = FAMILIES["llama"]()
    model, done = quantised("llama", bits)
    kinds = {type(module) for module in model.modules()}
    assert {RowProjection, ByteEmbedding, ByteLinear} <= kinds and nn.Linear not in kinds
    assert isinstance(model.model.layers[0].self_attn.q_proj, RowProjection if bits == 4 else ByteLinear)
    assert done.left == () and str(done).startswith(f"{bits} bits: weights ")
    with torch.no_grad():
        ours, theirs = model(IDS).logits, before(IDS).logits
    share = (ours - theirs).square().mean() / theirs.square().mean()
    assert share < (0.15 if bits == 4 else 0.003)


@pytest.mark.parametrize(("bits", "hidden", "tied"), [(8, 512, True), (4, 32, True), (4, 512, True), (4, 512, False)])
def test_embedding_and_head(bits, hidden, tied, tmp_path):
    """Rows of 6 bits beside rows of 4 where that is smaller, else bytes; one tensor where they are tied."""
    import transformers as t

    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = t.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        before = model(IDS % 64).logits
    words = model.model.embed_tokens.weight.detach().clone()
    dartprune.quantise(model, bits)
    head, embedding, in_rows = model.lm_head, model.model.embed_tokens, bits == 4 and hidden == 512
    for name in ("head", "tail") if in_rows else ("weight8", "scale"):
        assert (getattr(head, name) is getattr(embedding, name)) == tied
    if in_rows:
        assert head.layout.bits == embedding.layout.bits == VOCABULARY and isinstance(embedding, RowEmbedding)
        assert embedding.head.nbytes + embedding.tail.nbytes < 0.9 * words.numel()
        torch.testing.assert_close(head.rows().unpacked("up").std(), words.std(), rtol=0.05, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(embedding(torch.arange(64)), words, rtol=0, atol=2e-3)
        for ids in (torch.tensor([[63, 0], [7, 7]]), torch.tensor([5], dtype=torch.int32), torch.arange(0)):
            assert torch.equal(embedding(ids), embedding(torch.arange(64))[ids.long()])
        for wrong in (torch.tensor([3, 64]), torch.tensor([-65]), torch.arange(65)):
            with pytest.raises(IndexError):
                embedding(wrong)
        after, few = model(IDS % 64).logits, model(IDS[:, :3] % 64).logits
    tolerance = 0.3 if bits == 4 else 0.05
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance * float(before.abs().max()))
    model.save_pretrained(tmp_path)
    again = load_packed(tmp_path)
    assert type(again.lm_head) is type(head) and count(again) == count(model)
    with torch.no_grad():
        assert torch.equal(again(IDS % 64).logits, after) and torch.equal(again(IDS[:, :3] % 64).logits, few)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "gpt2", "phi3", "opt", "gemma2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "pruner",
    [
        dartprune.Dart(0.5, min_traced=4),
        dartprune.GatedDart(0.4, min_traced=4),
        dartprune.SketchDart(0.25),
        dartprune.PerToken(0.5),
        dartprune.Static(0.5, min_traced=4),
    ],
    ids=lambda pruner: pruner.name,
)
def test_pruned_steps_are_those_of_the_reference(family, bits, pruner):
    """The kernels against the reference backend, which unpacks; token by token with the same masks."""
    model, _ = quantised(family, bits, whole=False)
    logits, reports = {}, {}
    for backend in ("auto", "reference"):
        run = pruner.attach(model, backend=backend)
        out = []
        with torch.no_grad():
            cache = run.prefill(IDS)
            for token in (7, 50, 11):
                with run.phase("decode"):
                    out.append(model(torch.tensor([[token]]), **handed(cache)).logits[0, -1])
        run.detach()
        logits[backend], reports[backend] = torch.stack(out), run.report()
    assert reports["auto"].pruned_tokens == reports["reference"].pruned_tokens == 3
    assert reports["auto"].realised_sparsity == pytest.approx(reports["reference"].realised_sparsity, abs=0.02)
    assert reports["auto"].realised_sparsity == pytest.approx(pruner.sparsity, abs=0.03)
    error = (logits["auto"] - logits["reference"]).square().mean() / logits["reference"].square().mean()
    # inputs rounded to 8 bits, and neurons at the cut that change places for it
    assert error < 0.03
    if pruner.name not in ("PerToken",):
        assert reports["auto"].backend == "cpu" and reports["auto"].bytes_saved > 0.15


def test_a_batch_gives_each_line_what_it_gets_alone():
    model, _ = quantised("llama", 4)
    lines = torch.stack([IDS[0], IDS[0].flip(0), IDS[0].roll(5)])
    for pruner in (dartprune.Dart(0.5), dartprune.SketchDart(0.3)):
        run = pruner.attach(model)
        together = model.generate(lines, max_new_tokens=8, do_sample=False)
        alone = [model.generate(line[None], max_new_tokens=8, do_sample=False)[0] for line in lines]
        run.detach()
        assert torch.equal(together, torch.stack(alone))


def test_the_sketch_of_nested_rows_costs_what_the_report_says():
    model, _ = quantised("llama", 4)
    rows = row_weights(describe(model).layers[0])
    run = dartprune.SketchDart(0.25).attach(model)
    model.generate(IDS, max_new_tokens=6, do_sample=False)
    report = run.report()
    run.detach()
    kept = report.layers[0].kept
    read = rows.head.nbytes + kept * rows.layout.tail
    # beside the weights: norms, and what the context taught: four moments and a mean of each neuron, all means together
    read += rows.neurons * (4 + 4 * 2 + 2) + rows.hidden * 4
    assert 1 - read / (rows.neurons * rows.row_bytes) == pytest.approx(report.realised_sparsity, abs=0.01)


def test_what_was_packed_is_let_go_layer_by_layer():
    model = FAMILIES["llama"]()
    layers = model.model.layers
    former = [weakref.ref(layer.mlp.up_proj.weight) for layer in layers]
    attention, norm = weakref.ref(layers[0].self_attn.q_proj.weight), layers[0].input_layernorm.weight
    place, value = norm.data_ptr(), norm.clone()
    alive = []
    dartprune.quantise(model, bits=8, progress=lambda done, count: alive.append([ref() is not None for ref in former]))
    assert alive == [[number > done for number in range(len(former))] for done in range(len(former))]
    assert attention() is None
    # what is left is no view of what may be a mapped file
    assert layers[0].input_layernorm.weight is norm and norm.data_ptr() != place and torch.equal(norm, value)


def test_what_is_refused_changes_nothing():
    model = FAMILIES["llama"]()
    state = copy.deepcopy(model.state_dict())

    def refused(match, call, model=model):
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    refused("bits must be 4 or 8, got 3", lambda: dartprune.quantise(model, 3))
    refused("bits must be 4 or 8, got True", lambda: dartprune.quantise(model, True))
    run = dartprune.Dart(0.5).attach(model)
    refused("is attached", lambda: dartprune.quantise(model))
    run.detach()
    model.train()
    refused("training mode", lambda: dartprune.quantise(model))
    model.eval()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: None)
    refused("layer 1 cannot be quantised: .*hooks", lambda: dartprune.quantise(model))
    with pytest.raises(TypeError):
        dartprune.quantise("model")


def test_what_a_quantised_model_refuses():
    model, _ = quantised("llama", 4)
    with pytest.raises(ValueError, match="quantised already"):
        dartprune.quantise(model)
    with pytest.raises(ValueError, match="high 2 bits of this model's 4-bit rows"):
        dartprune.SketchDart(0.2, token=dartprune.Sketch(bits=2)).attach(model)
    assert dartprune.run_of(model) is None
    with pytest.raises(ValueError, match="computes on the CPU"):
        model.to("meta")
    flat, _ = quantised("llama", 4, nested=False)
    with pytest.raises(ValueError, match="not nested"):
        dartprune.SketchDart(0.2).attach(flat)


def test_torch_keeps_its_number_of_threads():
    """The first use of Numba's threads in a process sets those of torch to the number of cores, on a shared runtime."""
    code = (
        "import torch; torch.set_num_threads(1); from dartprune.loading import load; load(dtype='int4'); "
        "print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["1"], done.stderr


def test_copies_and_pickles_go_on():
    model, _ = quantised("llama", 4)
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.equal(copy.deepcopy(model)(IDS).logits, before)
        assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, before)


def test_gradients_pass_through_unpacked_weights():
    model, _ = quantised("llama", 4, whole=False)
    embedded = model.get_input_embeddings()(IDS[:, :2]).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert torch.isfinite(embedded.grad).all() and embedded.grad.abs().sum() > 0


def test_loading_in_4_and_8_bits():
    for name, bits in (("int4", 4), ("int8", 8)):
        model, tokenizer = load(dtype=name)
        assert row_weights(describe(model).layers[0]).layout.bits == bits
        assert tokenizer.padding_side == "left"
    with pytest.raises(ValueError, match="int8 or int4"):
        load(dtype="int5")
    with pytest.raises(ValueError, match="for the CPU"):
        load(dtype="int4", device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lines", [1, 3, 8, 9])
def test_layers_of_bytes_are_what_their_weights_say(dtype, lines):
    torch.manual_seed(lines)
    weight, bias, x = torch.randn(77, 100), torch.randn(77), torch.randn(2, lines, 100)
    layer = ByteLinear(*bytes_of(weight.to(dtype)), bias.to(dtype))
    exact = (layer.weight8.double() * layer.scale.double()[:, None]).float()
    for given in (x[0], x[:1]):
        with torch.no_grad():
            got = layer(given.to(dtype))
        want = torch.nn.functional.linear(given.to(dtype).float(), exact, bias.to(dtype).float())
        assert got.dtype == dtype and got.shape == want.shape
        rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}[dtype]
        assert (got.float() - want).abs().max() < rounding * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(77, 100), (1, 32), (48, 576), (7, 33)])
@pytest.mark.parametrize("lines", [1, 3, FEW + 1])
@pytest.mark.parametrize("bits", [4, 6])
def test_layers_in_rows_of_their_own_are_what_their_weights_say(dtype, shape, lines, bits):
    torch.manual_seed(lines)
    outputs, inputs = shape
    weight, bias, x = torch.randn(shape), torch.randn(outputs), torch.randn(2, lines, inputs)
    layer = RowProjection(lone_rows(weight.to(dtype), bits), "up", bias.to(dtype))
    exact = layer.rows().unpacked("up", dtype=torch.float64)
    error = (exact - weight).square().mean()
    assert exact.shape == shape and error < (0.01 if bits == 4 else 0.0008)  # of weights of size 1
    assert layer.is_alone and f"{bits} bits" in repr(layer)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x.to(dtype)), layer(x.to(dtype)))
    for given in (x[0].to(dtype), x[:1].to(dtype)):
        with torch.no_grad():
            got = layer(given)
        wide = rounded_inputs(given.flatten(0, -2)).view(given.shape) if lines <= FEW else given
        want = torch.nn.functional.linear(wide.double(), exact, bias.to(dtype).double())
        assert got.dtype == dtype and got.shape == want.shape
        rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-4)
        assert (got.double() - want).abs().max() < rounding * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("lines", [2, 20])
def test_gradients_pass_through_packed_layers(lines):
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    for layer in (ByteLinear(*bytes_of(weight), None), RowProjection(lone_rows(weight), "up", None)):
        x = torch.randn(lines, 64, requires_grad=True)
        out = layer(x)
        with torch.no_grad():
            # without a gradient few inputs are rounded to 8 bits
            assert (out - layer(x)).square().mean() < 1e-3 * out.square().mean()
            exact = layer(torch.eye(64)).sum(1)
        out.sum().backward()
        assert torch.allclose(x.grad, exact.expand(lines, -1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_reach_the_inputs_of_a_whole_model(bits):
    model, _ = quantised(bits=bits)
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
