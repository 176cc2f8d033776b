// SiLU, x / (1 + exp(-x)), at most 3.5 units in the last place from the exact value for every float32.
//
// torch's own returns -0 below -88.7, where the exact value is as large as -2.7e-37, and NaN for -infinity.
// Proof: tests/kernels/cpu/test_silu.py (all of float32).
#pragma once

#include "exponential.h"

namespace fastddpm::FASTDDPM_ISA {

template <int COUNT>
void silu(Lanes (&x)[COUNT]) {
    Lanes a[COUNT];  // -|x|, bounded also because it is a factor: the product of infinity and 0 is NaN
    for (int i = 0; i < COUNT; ++i) a[i] = at_least(-120.0f, bits_as<Lanes>(bits_as<Bits>(x[i]) | 0x80000000u));
    Exponentials<COUNT> e(a);
    for (int i = 0; i < COUNT; ++i) {
        auto negative = bits_as<SignedBits>(x[i]) < 0;
        Lanes quotient = (negative ? a[i] * e.fraction[i] : x[i]) / (1.0f + e.value(i));
        x[i] = quotient * (negative ? e.first(i) : all(1.0f)) * (negative ? e.second(i) : all(1.0f));
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
