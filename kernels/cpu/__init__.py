"""The kernels in C++, for CPUs: one file per fused operation, the twin of the Triton file of that name."""
