// SiLU, x / (1 + exp(-x)), at most 3.5 units in the last place from the exact value for every float32.
//
// torch's own returns -0 below -88.7, where the exact value is as large as -2.7e-37, and NaN for -infinity.
// Proof: tests/kernels/test_silu.py (all of float32).
#pragma once

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

// Bits of b where the mask is set, else of a. Selecting by `?:`, the compiler computes both results to the end.
inline float select(float a, float b, uint32_t mask) {
    return bits_as<float>((bits_as<uint32_t>(a) & ~mask) | (bits_as<uint32_t>(b) & mask));
}

inline float power_of_two(uint32_t k) { return bits_as<float>((k + 127) << 23); }  // -126 <= k <= 127, as signed

inline float silu(float x) {
    uint32_t negative = uint32_t(bits_as<int32_t>(x) >> 31);
    float a = bits_as<float>(bits_as<uint32_t>(x) | 0x80000000);  // -|x|
    a = a < -120.0f ? -120.0f : a;  // from here on the result rounds to -0; NaN stays NaN
    // exp(a) = 2^k exp(r), |r| <= ln(2) / 2; adding and subtracting 1.5 2^23 rounds to a whole number
    float shifted = a * 1.44269504f + 12582912.0f;
    uint32_t k = bits_as<uint32_t>(shifted) - 0x4B400000;
    float whole = shifted - 12582912.0f;
    float r = (a - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln(2) in two parts, the first of 17 bits
    float p = 1.97903e-4f;
    p = p * r + 1.3944703e-3f;
    p = p * r + 8.333498e-3f;
    p = p * r + 4.1666295e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 0.5f;
    p = (p * (r * r) + r) + 1.0f;
    // two factors, so that neither is subnormal, and a subnormal result is rounded once
    uint32_t half = uint32_t(int32_t(k) >> 1);
    float first = power_of_two(half), second = power_of_two(k - half);
    float quotient = select(x, a * p, negative) / (1.0f + p * first * second);
    return quotient * select(1.0f, first, negative) * select(1.0f, second, negative);
}

}  // namespace fastddpm::FASTDDPM_ISA
