// What the kernels that take reverse steps have in common.
#pragma once

#include "philox.h"

namespace fastddpm::FASTDDPM_ISA {

struct Row {  // fastddpm.core.table.COLUMNS
    float cx, cm, lo, hi, A, B, C, S, L, V, P, Q, R, U;
};

// The step of `count` elements without its noise: returns x_{t-1} in `next`. m: the network's output.
inline void mean_of(const Row& row, bool clip, int count, const float* x, const float* m, float* next) {
    if (clip) {
        for (int i = 0; i < count; ++i) {
            float x_0 = row.cx * x[i] + row.cm * m[i];
            x_0 = x_0 < row.lo ? row.lo : x_0;  // NaN stays NaN
            x_0 = x_0 > row.hi ? row.hi : x_0;
            next[i] = (row.A * x_0 + row.B * x[i]) + row.C * m[i];
        }
    } else {
        for (int i = 0; i < count; ++i) next[i] = row.B * x[i] + row.C * m[i];
    }
}

// The step of `count` elements of a block, with its noise.
inline void reverse_step(const Row& row, bool clip, const Address& address, int64_t t, int64_t block, int count,
                         const float* x, const float* m, float* next) {
    mean_of(row, clip, count, x, m, next);
    if (row.S == 0) return;
    float z[BLOCK];
    normals(address, STEP_STREAM, t, block, z);
    for (int i = 0; i < count; ++i) next[i] += row.S * z[i];
}

inline bool all_finite(int count, const float* x) {
    uint32_t bad = 0;
    for (int i = 0; i < count; ++i) bad |= (bits_as<uint32_t>(x[i]) & 0x7F800000) == 0x7F800000;
    return !bad;
}

inline void raise_to(int32_t* flag, int32_t pos) {  // other threads may raise it too
    int32_t seen = __atomic_load_n(flag, __ATOMIC_RELAXED);
    while (seen < pos && !__atomic_compare_exchange_n(flag, &seen, pos, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
