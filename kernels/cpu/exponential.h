// exp(a) of vectors, for a <= 120, as a product of three factors.
#pragma once

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

constexpr float MOST_EXPONENT = 120.0f;  // of which exp is infinite

inline Lanes all(float value) { return Lanes{} + value; }

inline Lanes at_least(float least, Lanes a) { return a < least ? all(least) : a; }  // NaN stays NaN

inline Lanes at_most(float most, Lanes a) { return a > most ? all(most) : a; }

inline Lanes power_of_two(Bits k) { return bits_as<Lanes>((k + 127u) << 23); }  // -126 <= k <= 127, as signed

// exp(a) = fraction * first * second of COUNT vectors. The latter two are powers of two and not subnormal, so that a
// subnormal product is rounded once. A vector is a chain of dependent operations; several at a time hide its latency.
template <int COUNT>
struct Exponentials {
    Lanes fraction[COUNT];
    Bits k[COUNT];

    explicit Exponentials(const Lanes (&a)[COUNT]) {
        for (int i = 0; i < COUNT; ++i) {
            Lanes bounded = at_least(-120.0f, a[i]);  // where the product rounds to 0
            // exp(a) = 2^k exp(r), |r| <= ln(2) / 2; adding and subtracting 1.5 2^23 rounds to a whole number
            Lanes shifted = bounded * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
            k[i] = bits_as<Bits>(shifted) - 0x4B400000u;
            // r, for now; ln(2) is in two parts, the first of 15 bits, so that its product is exact
            fraction[i] = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;
        }
        for (int i = 0; i < COUNT; ++i) {
            Lanes r = fraction[i], p = r * 1.97903e-4f + 1.3944703e-3f;
            p = p * r + 8.333498e-3f;
            p = p * r + 4.1666295e-2f;
            p = p * r + 1.6666666e-1f;
            p = p * r + 0.5f;
            fraction[i] = (p * (r * r) + r) + 1.0f;
        }
    }

    Lanes first(int i) const { return power_of_two(half(i)); }
    Lanes second(int i) const { return power_of_two(k[i] - half(i)); }
    Lanes value(int i) const { return fraction[i] * first(i) * second(i); }

  private:
    Bits half(int i) const { return bits_as<Bits>(bits_as<SignedBits>(k[i]) >> 1); }
};

}  // namespace fastddpm::FASTDDPM_ISA
