// SiLU, x / (1 + exp(-x)), and Mish (Misra 2019, arXiv:1908.08681), x tanh(log(1 + exp(x))).
//
// At most 3.5 and 4.5 units in the last place from the exact value for every float32. torch's own return -0 from about
// -89 down, where the exact value of SiLU is as large as -2.7e-37, and NaN for -infinity.
// Proof: tests/kernels/cpu/test_activation.py (all of float32).
#pragma once

#include "exponential.h"

namespace fastddpm::FASTDDPM_ISA {

enum Activation : int64_t { NONE, SILU, MISH };

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

// With w = exp(x), Mish is x n / (n + 2), where n = w (w + 2): a sum of positive numbers, so nothing cancels.
template <int COUNT>
void mish(Lanes (&x)[COUNT]) {
    Lanes a[COUNT];  // x, bounded: from 20 on, n / (n + 2) rounds to 1
    for (int i = 0; i < COUNT; ++i) a[i] = at_most(20.0f, at_least(-120.0f, x[i]));
    Exponentials<COUNT> e(a);
    for (int i = 0; i < COUNT; ++i) {
        auto negative = bits_as<SignedBits>(x[i]) < 0;
        Lanes w = e.value(i), n = w * (w + 2.0f), quotient = (negative ? w + 2.0f : n) / (n + 2.0f);
        Lanes factor = negative ? a[i] * e.fraction[i] : x[i];  // that of w follows in parts, as w may be subnormal
        x[i] = factor * quotient * (negative ? e.first(i) : all(1.0f)) * (negative ? e.second(i) : all(1.0f));
    }
}

template <int COUNT>
void activate(Lanes (&x)[COUNT], int64_t activation) {
    if (activation == SILU) silu(x);
    if (activation == MISH) mish(x);
}

}  // namespace fastddpm::FASTDDPM_ISA
