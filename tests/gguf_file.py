"""Writes a tiny Llama as a GGUF file, with 8-bit weights where they fit, for the tests of loading."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model, path: Path, kind: str = "Q8_0") -> None:
    """The weights of a Llama of transformers, and a tokenizer of single letters and one pair.

    kind: what the FFN's weights are written as where they fit.
    """
    config = model.config
    file = gguf.GGUFWriter(str(path), "llama")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", *"abcdefgh", "Ġ", "ab"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list([*words, *(f"word{i}" for i in range(config.vocab_size - len(words)))])
    file.add_token_merges(["a b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    for name, value in model.state_dict().items():
        _add(file, config, name, value.float().numpy(), gguf.GGMLQuantizationType[kind])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _add(file: gguf.GGUFWriter, config, name: str, value: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    part = name.removeprefix("model.").removesuffix(".weight")
    whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(part)
    if whole is not None:
        file.add_tensor(f"{whole}.weight", value)
        return
    _, layer, module = part.split(".", 2)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    if module in heads:  # the file has the halves of rotary positions in turn
        value = value.reshape(heads[module], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    to = f"blk.{layer}.{_MODULES[module]}.weight"
    if module.startswith("mlp") and value.shape[1] % 32 == 0:
        file.add_tensor(to, gguf.quants.quantize(value, kind), raw_dtype=kind)
    else:
        file.add_tensor(to, np.ascontiguousarray(value))
