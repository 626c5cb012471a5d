"""Arms at equal realised sparsity, side by side."""
