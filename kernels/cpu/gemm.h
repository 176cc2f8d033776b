// The matrix product in the middle of a convolution: rows of pixels or tiles times a panel of packed weights.
//
// C[row][column] = sum over k of A[row][k] B[k][column], in a fixed order. A is stored in chunks of CHUNK values of k:
// A[k / CHUNK][row][k % CHUNK], so that the addresses of all rows are constant offsets from one pointer.
#pragma once

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

constexpr int CHUNK = 16;
constexpr int SUMMED = 16;  // chunks that are summed before they are added to the rest, which bounds the error
constexpr int COLUMNS = 2 * LANES;  // of a panel of weights
#if defined(__AVX512F__)
constexpr int ROWS = 12;  // with 2 vectors each, 24 of 32 registers hold sums
#else
constexpr int ROWS = 6;
#endif

// `next`: memory to fetch meanwhile, as much as b has. Inlined into each other, these would spill their sums.
template <int COUNT, bool ADD>
__attribute__((noinline)) void product(const float* a, int64_t chunks, int64_t chunk_stride, const float* b,
                                       const float* next, float* c) {
    Lanes sum[COUNT][2];
    for (int row = 0; row < COUNT; ++row) sum[row][0] = sum[row][1] = Lanes{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk, a += chunk_stride)
        for (int k = 0; k < CHUNK; ++k, b += COLUMNS, next += COLUMNS) {
            for (int i = 0; i < COLUMNS; i += 16) __builtin_prefetch(next + i, 0, 2);
            Lanes left, right;
            std::memcpy(&left, b, sizeof left);
            std::memcpy(&right, b + LANES, sizeof right);
#pragma GCC unroll 12
            for (int row = 0; row < COUNT; ++row) {
                float value = a[row * CHUNK + k];
                sum[row][0] += value * left;
                sum[row][1] += value * right;
            }
        }
    for (int row = 0; row < COUNT; ++row) {
        Lanes before[2] = {};
        if (ADD) std::memcpy(before, c + row * COLUMNS, sizeof before);
        Lanes after[2] = {before[0] + sum[row][0], before[1] + sum[row][1]};
        std::memcpy(c + row * COLUMNS, after, sizeof after);
    }
}

template <bool ADD, int COUNT = ROWS>
inline void product_of(int count, const float* a, int64_t chunks, int64_t chunk_stride, const float* b,
                       const float* next, float* c) {
    if (count == COUNT) return product<COUNT, ADD>(a, chunks, chunk_stride, b, next, c);
    if constexpr (COUNT > 1) product_of<ADD, COUNT - 1>(count, a, chunks, chunk_stride, b, next, c);
}

// C[count][COLUMNS] for any count, in equal parts; A has `stride` rows.
inline void multiply(int count, const float* a, int64_t chunks, int64_t stride, const float* b, float* c) {
    int parts = (count + ROWS - 1) / ROWS;
    for (int64_t chunk = 0; chunk < chunks; chunk += SUMMED) {
        int64_t depth = smaller<int64_t>(SUMMED, chunks - chunk);
        const float *rows = a + chunk * stride * CHUNK, *panel = b + chunk * CHUNK * COLUMNS;
        for (int part = 0; part < parts; ++part) {
            int row = count * part / parts, rows_of_part = count * (part + 1) / parts - row;
            const float* next = panel + (part == 0 ? depth * CHUNK * COLUMNS : 0);  // of the next call, likely
            auto run = chunk ? product_of<true> : product_of<false>;
            run(rows_of_part, rows + row * CHUNK, depth, stride * CHUNK, panel, next, c + row * COLUMNS);
        }
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
