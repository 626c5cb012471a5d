"""Row kernels for CPUs, compiled by Numba."""
