"""Row kernels for GPUs, written in Triton."""
