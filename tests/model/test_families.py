"""The table says what each family's layers really compute; structure finds the same; the rest is refused."""

from __future__ import annotations

from dataclasses import fields

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.activations import ACT2FN

from dartprune.ffn.backend import activation
from dartprune.model import families
from dartprune.model.families import Family, describe, register_family
from dartprune.model.layer import activation_name
from tiny import FAMILIES

SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SMALL = {
    **SMALL,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 64,
    "num_key_value_heads": 4,
}
GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}
# families in which attention and FFN read the same residual stream
PARALLEL = {"falcon", "falcon-new", "falcon-new-one-norm", "gpt_neox"}


def make(model, config, **options):
    """A random model in which every parameter matters."""
    torch.manual_seed(0)
    made = model(config(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return made


def one_norm():
    options = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    return make(hf.FalconForCausalLM, hf.FalconConfig, **{k: v for k, v in SMALL.items() if k != "head_dim"}, **options)


ALL = {**FAMILIES, "falcon-new-one-norm": one_norm}


def blocks_of(model):
    down = describe(model).layers[0].down
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(p is down for p in m[0].modules())]
    return list(lists[-1])


@torch.no_grad()
def seen_in(model):
    """First input and output of every module in one forward of two lines, copied before anything adds to them."""
    seen = {}

    def note(module, args, kwargs, out):
        given = args[0] if args else kwargs.get("hidden_states")
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(given, torch.Tensor) and isinstance(out, torch.Tensor):
            seen.setdefault(module, (given.clone(), out.clone()))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    model(input_ids=torch.arange(5, 25).view(2, 10), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", sorted(ALL))
@torch.no_grad()
def test_the_table_says_what_the_layers_compute(family):
    model = ALL[family]()
    decoder, blocks, seen = describe(model), blocks_of(model), seen_in(model)
    assert decoder.recognised == "table" and len(decoder.layers) == len(blocks)
    for layer, block in zip(decoder.layers, blocks, strict=True):
        x = seen[layer.entry][0]
        torch.testing.assert_close(layer.activations(x), seen[layer.down][0], rtol=0, atol=0)
        assert seen[layer.down][0].shape[-1] == layer.neurons and x.shape[-1] == layer.hidden
        inside = set(block.modules())
        assert {layer.entry, layer.up, layer.down, layer.contribution, layer.attention_output} <= inside
        given, made = seen[block]
        y = (x if layer.norm is None else seen[layer.norm][0]).view_as(given)
        z = seen[layer.contribution][1].view_as(given) * layer.scale
        attention = seen[layer.attention_output][1].view_as(given)
        assert torch.equal(y, given) == (family in PARALLEL)
        # a norm after the sum hides it
        total = seen[block.final_layer_norm][0].view_as(given) if family == "opt-post" else made
        torch.testing.assert_close(y + z + (attention if family in PARALLEL else 0), total, rtol=1e-5, atol=1e-4)
        assert z.norm() > 0.01 * y.norm(), "a contribution this small would prove nothing"


@pytest.mark.parametrize("family", sorted(ALL))
def test_structure_finds_what_the_table_says(family, monkeypatch):
    model = ALL[family]()
    want = describe(model)
    monkeypatch.setattr(families, "FAMILIES", {})
    got = describe(model)
    assert (got.recognised, got.family, got.hidden) == ("structure", want.family, want.hidden)
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        assert [f.name for f in fields(mine) if getattr(mine, f.name) != getattr(theirs, f.name)] == []


# families without a row: norm of the first layer, contribution, whether attention and FFN are parallel
UNKNOWN = {
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, SMALL, "post_attention_layernorm", "mlp"),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig, SMALL, "input_layernorm", "mlp"),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, {**GPT, "rotary_dim": 4}, "ln_1", "mlp"),
    "glm4": (hf.Glm4ForCausalLM, hf.Glm4Config, SMALL, "post_attention_layernorm", "post_mlp_layernorm"),
    "olmo3": (hf.Olmo3ForCausalLM, hf.Olmo3Config, SMALL, None, "post_feedforward_layernorm"),
    "nemotron": (hf.NemotronForCausalLM, hf.NemotronConfig, SMALL, "post_attention_layernorm", "mlp"),
}


@pytest.mark.parametrize("family", sorted(UNKNOWN))
def test_families_without_a_row(family):
    model, config, options, norm, contribution = UNKNOWN[family]
    built = make(model, config, **options)
    decoder = describe(built)
    block, layer = blocks_of(built)[0], decoder.layers[0]
    assert decoder.recognised == "structure"
    assert layer.norm is (None if norm is None else block.get_submodule(norm))
    assert layer.contribution is block.get_submodule(contribution)
    assert describe(built) is decoder, "one forward is enough"


def test_a_changed_module_is_seen():
    built = make(hf.GemmaForCausalLM, hf.GemmaConfig, **SMALL)
    first = describe(built)
    new = built.model.layers[0].mlp.down_proj = nn.Linear(64, 32, bias=False).eval()
    assert first.layers[0].down is not new and describe(built).layers[0].down is new


REFUSED = {
    "encoder-decoder": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {"d_model": 32, "num_layers": 1},
        "encoder-decoder",
    ),
    "experts": (hf.MixtralForCausalLM, hf.MixtralConfig, {**SMALL, "num_local_experts": 4}, "mixture-of-experts"),
    "encoder": (hf.BertModel, hf.BertConfig, {**SMALL, "head_dim": None}, "generates text"),
    "state space": (hf.MambaForCausalLM, hf.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2}, "MambaBlock"),
    # a norm inside the FFN, an FFN that adds the residual stream itself, norms after the sums
    "bitnet": (hf.BitNetForCausalLM, hf.BitNetConfig, SMALL, "input of its down projection"),
    "mpt": (hf.MptForCausalLM, hf.MptConfig, {"d_model": 32, "n_heads": 4, "n_layers": 2}, "more to the output"),
    "openai-gpt": (hf.OpenAIGPTLMHeadModel, hf.OpenAIGPTConfig, GPT, "not the usual decoder"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_by_name(kind):
    model, config, options, why = REFUSED[kind]
    with pytest.raises(ValueError, match=why) as caught:
        describe(make(model, config, **options))
    message = str(caught.value)
    assert model.__name__ in message and "\n" not in message


def test_an_unknown_shape_says_what_to_do():
    with pytest.raises(ValueError, match=r"Looked for: .*gate_proj/up_proj/down_proj.*register_family\('mamba', "):
        describe(make(hf.MambaForCausalLM, hf.MambaConfig, hidden_size=32, num_hidden_layers=2))


def test_structure_wants_a_forward_that_proves_something(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", {})
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        describe(FAMILIES["llama"]().train())
    with pytest.raises(ValueError, match="meta device"):
        describe(FAMILIES["llama"]().to("meta"))


def test_structure_refuses_a_layer_that_does_something_else(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", {})
    twice = FAMILIES["llama"]()
    block = twice.model.layers[1]
    plain = block.forward
    block.forward = lambda x, **options: plain(x, **options) + 0.1 * x.roll(1, -1)
    with pytest.raises(ValueError, match=r"layer 1 \(LlamaDecoderLayer\): its output is not the residual stream"):
        describe(twice)
    seeing = FAMILIES["llama"]()
    monkeypatch.setattr("dartprune.model.structure._close", lambda one, other, *rest: one.shape[0] != 5)
    with pytest.raises(ValueError, match="not causal"):
        describe(seeing)


@pytest.mark.parametrize("thing", [None, 3, {}, "gpt2", nn.Linear(2, 2)])
def test_what_is_no_model_is_a_type_error(thing):
    with pytest.raises(TypeError, match=type(thing).__name__):
        describe(thing)


def test_a_row_of_ones_own(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    model = make(hf.GemmaForCausalLM, hf.GemmaConfig, **SMALL)
    register_family("gemma", families.FAMILIES["llama"])
    assert describe(model).recognised == "table"
    with pytest.raises(ValueError, match="'gemma' has a row already"):
        register_family("gemma", families.FAMILIES["llama"])
    monkeypatch.setitem(families.FAMILIES, "gemma", families.FAMILIES["llama"].but(down="mlp.lower"))
    with pytest.raises(ValueError, match=r"'mlp\.lower'"):
        describe(model)
    assert isinstance(families.FAMILIES["gemma"], Family)


def test_the_text_tower_of_a_model_that_sees():
    text = {**SMALL, "num_key_value_heads": 2, "sliding_window": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    decoder = describe(model)
    assert decoder.recognised == "table"
    assert decoder.layers[0].down is model.model.language_model.layers[0].mlp.down_proj


# peft 0.21 asks transformers 5.23 by an old name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_shells_are_looked_through():
    plain = FAMILIES["llama"]()
    assert describe(torch.compile(plain, backend="eager")) == describe(plain)
    adapted = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(target_modules=["down_proj"], r=2))
    layer = describe(adapted).layers[0]
    assert type(layer.down).__module__.startswith("peft")
    assert (layer.hidden, layer.neurons) == (plain.config.hidden_size, plain.config.intermediate_size)
    plain.add_adapter(peft.LoraConfig(target_modules=["up_proj"], r=2))
    assert type(describe(plain).layers[0].up).__module__.startswith("peft")


# prelu and xielu have parameters, and no canonical name either
@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_a_canonical_name_computes_the_same(name):
    act = ACT2FN[name]
    canonical = activation_name(act)
    if canonical == "other":
        return
    x = torch.linspace(-6, 6, 241)
    torch.testing.assert_close(activation(canonical, x), act(x), rtol=1e-5, atol=2e-6)


def test_activation_names():
    names = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu2": "relu2", "quick_gelu": "quick_gelu"}
    assert {name: activation_name(ACT2FN[name]) for name in names} == names
    assert activation_name(nn.functional.silu) == "silu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(ACT2FN["mish"]) == "other"

    class SiLU(nn.SiLU):
        def forward(self, x):
            return 2 * super().forward(x)

    assert activation_name(SiLU()) == "other"
