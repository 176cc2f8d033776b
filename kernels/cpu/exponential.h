// exp(a) for a <= 0, as a product of three factors.
#pragma once

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

inline float power_of_two(uint32_t k) { return bits_as<float>((k + 127) << 23); }  // -126 <= k <= 127, as signed

// exp(a) = fraction * first * second. The latter two are powers of two and not subnormal, so that a subnormal product
// is rounded once.
struct Exponential {
    float fraction, first, second;

    explicit Exponential(float a) {
        a = a < -120.0f ? -120.0f : a;  // where the product rounds to 0; NaN stays NaN
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
        fraction = (p * (r * r) + r) + 1.0f;
        uint32_t half = uint32_t(int32_t(k) >> 1);
        first = power_of_two(half);
        second = power_of_two(k - half);
    }

    float value() const { return fraction * first * second; }
};

}  // namespace fastddpm::FASTDDPM_ISA
