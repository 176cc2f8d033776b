// Sums in a specified order: a binary tree over the elements, neighbours first, zeros beyond the end.
//
// A block of 2^k elements is a subtree, so the sum of many blocks is the tree over their sums.
// Spec: fastddpm/reference/diffusion.py::tree_sum. Proof: tests/ops/test_eps_loss.py (bits).
#pragma once

#include "kernel.h"
#include "philox.h"

namespace fastddpm::FASTDDPM_ISA {

// The sum of `count` values, which it overwrites; count >= 1.
inline float tree_sum(float* x, int64_t count) {
    for (; count > 1; count = (count + 1) / 2) {
        for (int64_t i = 0; i < count / 2; ++i) x[i] = x[2 * i] + x[2 * i + 1];
        if (count % 2) x[count / 2] = x[count - 1] + 0.0f;
    }
    return x[0];
}

// As tree_sum for all values of a block; those beyond the sample are zero.
inline float tree_sum_of_block(float (&x)[BLOCK]) {
    float half[BLOCK / 2];
    for (int count = BLOCK / 2; count >= 1; count /= 2) {
        for (int i = 0; i < count; ++i) half[i] = x[2 * i] + x[2 * i + 1];
        std::memcpy(x, half, sizeof(float) * count);
    }
    return x[0];
}

}  // namespace fastddpm::FASTDDPM_ISA
