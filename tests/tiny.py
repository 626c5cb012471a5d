import torch
from transformers import LlamaConfig, LlamaForCausalLM
def llama():
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=None, bos_token_id=1)).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.dim() > 1: p *= 5
    return m
FAMILIES = {"llama": llama}
