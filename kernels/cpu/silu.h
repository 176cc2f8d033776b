// SiLU, x / (1 + exp(-x)), at most 3.5 units in the last place from the exact value for every float32.
//
// torch's own returns -0 below -88.7, where the exact value is as large as -2.7e-37, and NaN for -infinity.
// Proof: tests/kernels/cpu/test_silu.py (all of float32).
#pragma once

#include "exponential.h"

namespace fastddpm::FASTDDPM_ISA {

// Bits of b where the mask is set, else of a. Selecting by `?:`, the compiler computes both results to the end.
inline float select(float a, float b, uint32_t mask) {
    return bits_as<float>((bits_as<uint32_t>(a) & ~mask) | (bits_as<uint32_t>(b) & mask));
}

inline float silu(float x) {
    uint32_t negative = uint32_t(bits_as<int32_t>(x) >> 31);
    float a = bits_as<float>(bits_as<uint32_t>(x) | 0x80000000);  // -|x|
    a = a < -120.0f ? -120.0f : a;  // also where it is a factor: the product of infinity and 0 is NaN
    Exponential e(a);
    float quotient = select(x, a * e.fraction, negative) / (1.0f + e.value());
    return quotient * select(1.0f, e.first, negative) * select(1.0f, e.second, negative);
}

}  // namespace fastddpm::FASTDDPM_ISA
