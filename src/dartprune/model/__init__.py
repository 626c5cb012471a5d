"""How a transformers model is taken apart."""
