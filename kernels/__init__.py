"""Triton kernels, one fused operation each; fastddpm.ops checks their arguments and falls back to torch."""
