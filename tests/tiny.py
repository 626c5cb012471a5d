"""Tiny random models of every family, in float32, the same at every call."""

from __future__ import annotations

import torch
import transformers as t

_LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _make(model, config, **options):
    def build(**changes):
        """The model; `changes` replace settings that its family has."""
        torch.manual_seed(0)
        settings = options | {name: value for name, value in changes.items() if name in options}
        made = model(config(**settings)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.dim() > 1:
                    parameter *= 6
                elif name.endswith("bias"):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return made

    return build


FAMILIES = {
    "llama": _make(t.LlamaForCausalLM, t.LlamaConfig, **_LLAMA),
    "llama-bias": _make(t.LlamaForCausalLM, t.LlamaConfig, mlp_bias=True, attention_bias=True, **_LLAMA),
    "mistral": _make(t.MistralForCausalLM, t.MistralConfig, sliding_window=16, **_LLAMA),
    "qwen2": _make(t.Qwen2ForCausalLM, t.Qwen2Config, **_LLAMA),
    "qwen3": _make(t.Qwen3ForCausalLM, t.Qwen3Config, head_dim=8, **_LLAMA),
    "gemma2": _make(t.Gemma2ForCausalLM, t.Gemma2Config, head_dim=8, sliding_window=16, **_LLAMA),
    "gemma3": _make(t.Gemma3ForCausalLM, t.Gemma3TextConfig, head_dim=8, sliding_window=16, **_LLAMA),
    "phi3": _make(t.Phi3ForCausalLM, t.Phi3Config, **_LLAMA),
    "gpt2": _make(
        t.GPT2LMHeadModel,
        t.GPT2Config,
        vocab_size=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
    "opt": _make(t.OPTForCausalLM, t.OPTConfig, ffn_dim=72, word_embed_proj_dim=32, **_GPT),
    "opt-post": _make(
        t.OPTForCausalLM, t.OPTConfig, ffn_dim=72, word_embed_proj_dim=32, do_layer_norm_before=False, **_GPT
    ),
    "gpt_neox": _make(t.GPTNeoXForCausalLM, t.GPTNeoXConfig, intermediate_size=72, **_GPT),
    "gpt_neox-sequential": _make(
        t.GPTNeoXForCausalLM, t.GPTNeoXConfig, intermediate_size=72, use_parallel_residual=False, **_GPT
    ),
    "falcon": _make(t.FalconForCausalLM, t.FalconConfig, multi_query=True, parallel_attn=True, **_GPT),
    "falcon-new": _make(t.FalconForCausalLM, t.FalconConfig, new_decoder_architecture=True, num_kv_heads=2, **_GPT),
    "falcon-sequential": _make(t.FalconForCausalLM, t.FalconConfig, parallel_attn=False, bias=True, **_GPT),
    "starcoder2": _make(t.Starcoder2ForCausalLM, t.Starcoder2Config, **_LLAMA),
    "olmo2": _make(t.Olmo2ForCausalLM, t.Olmo2Config, **_LLAMA),
    "granite": _make(t.GraniteForCausalLM, t.GraniteConfig, residual_multiplier=0.5, **_LLAMA),
    "smollm3": _make(t.SmolLM3ForCausalLM, t.SmolLM3Config, **_LLAMA),
}
