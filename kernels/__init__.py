"""Triton kernels, one fused operation per file. `fastddpm.ops` checks their arguments, and runs torch without a GPU."""
