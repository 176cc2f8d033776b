// The matrix product in the middle of a convolution: rows of pixels or tiles times a panel of packed weights.
//
// C[row][column] = sum over k of A[row][k] B[k][column] in fp32, in a fixed order. A and B consist of words: a float,
// or two bfloat16 with adjacent k. A is stored in chunks of CHUNK words: A[k / CHUNK][row][k % CHUNK], so that the
// addresses of all rows are constant offsets from one pointer; B[k][column] is a panel of COLUMNS columns.
#pragma once

#include "floats.h"

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace fastddpm::FASTDDPM_ISA {

constexpr int CHUNK = 16;
// Up to SUMMED chunks are summed at once. Longer sums are added up from parts of half as many, which bounds the error.
constexpr int SUMMED = 16;
constexpr int COLUMNS = 2 * LANES;  // of a panel of weights
constexpr int LINE = 16;  // floats of a cache line
constexpr int SLACK = 32;  // rows beyond the last one that A and C must have: they are computed, but not used
#if defined(__AVX512F__)
constexpr int ROWS = 12;  // with 2 vectors each, 24 of 32 registers hold sums
#else
constexpr int ROWS = 6;
#endif

template <class T>
constexpr int PER_WORD = int(sizeof(float) / sizeof(T));

// Whether this instruction set multiplies words of T.
template <class T>
constexpr bool MULTIPLIES = false;
template <>
constexpr bool MULTIPLIES<float> = true;
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
template <>
constexpr bool MULTIPLIES<BFloat16> = true;
#endif

template <class T>
Lanes add_product(Lanes sum, float a, Lanes b) {
    static_assert(MULTIPLIES<T>);
#if defined(__AVX512BF16__)
    if constexpr (PER_WORD<T> == 2) {
        auto pairs = _mm512_castps_si512(_mm512_set1_ps(a));
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(b));
    }
#endif
    return sum + a * b;
}

// C = A B, or C += A B if `add` is set, for COUNT rows. With every 4 rows of B, also prefetch the following `lines`
// cache lines of `next`. Functions that are inlined into each other would spill their sums.
template <class T, int COUNT>
__attribute__((noinline)) void product(const float* a, int64_t chunks, int64_t chunk_stride, const float* b,
                                       const float* next, int lines, bool add, float* c) {
    Lanes sum[COUNT][2];
    for (auto& of_row : sum) of_row[0] = of_row[1] = Lanes{};  // gcc would zero `= {}` in memory first
    for (int64_t chunk = 0; chunk < chunks; ++chunk, a += chunk_stride)
        for (int begin = 0; begin < CHUNK; begin += 4) {
            for (int line = 0; line < lines; ++line, next += LINE) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
            for (int k = begin; k < begin + 4; ++k, b += COLUMNS) {
                Lanes left = load(b), right = load(b + LANES);
#pragma GCC unroll 12
                for (int row = 0; row < COUNT; ++row) {
                    float value = a[row * CHUNK + k];
                    sum[row][0] = add_product<T>(sum[row][0], value, left);
                    sum[row][1] = add_product<T>(sum[row][1], value, right);
                }
            }
        }
    for (int row = 0; row < COUNT; ++row)
        for (int i = 0; i < 2; ++i) {
            float* to = c + row * COLUMNS + i * LANES;
            store(add ? load(to) + sum[row][i] : sum[row][i], to);
        }
}

template <class T, int COUNT = ROWS>
inline void product_of(int count, const float* a, int64_t chunks, int64_t chunk_stride, const float* b,
                       const float* next, int lines, bool add, float* c) {
    if (count == COUNT) return product<T, COUNT>(a, chunks, chunk_stride, b, next, lines, add, c);
    if constexpr (COUNT > 1) product_of<T, COUNT - 1>(count, a, chunks, chunk_stride, b, next, lines, add, c);
}

// C[count][COLUMNS] for any count, in equal parts; A has `stride` rows. Each part also prefetches its share of the
// weights that come next: those of this panel, then of `following`.
template <class T>
void multiply(int count, const float* a, int64_t chunks, int64_t stride, const float* b, const float* following,
              float* c) {
    int parts = (count + ROWS - 1) / ROWS;
    int64_t summed = chunks > SUMMED ? SUMMED / 2 : SUMMED;
    for (int64_t chunk = 0; chunk < chunks; chunk += summed) {
        int64_t depth = smaller<int64_t>(summed, chunks - chunk);
        const float *rows = a + chunk * stride * CHUNK, *panel = b + chunk * CHUNK * COLUMNS;
        const float* next = chunk + depth < chunks ? panel + depth * CHUNK * COLUMNS : following;
        for (int part = 0; part < parts; ++part) {
            constexpr int LINES = 4 * COLUMNS / LINE;
            int row = count * part / parts, rows_of_part = count * (part + 1) / parts - row;
            int lines = LINES * (part + 1) / parts - LINES * part / parts;
            product_of<T>(rows_of_part, rows + row * CHUNK, depth, stride * CHUNK, panel, next, lines, chunk > 0,
                          c + row * COLUMNS);
            next += depth * CHUNK / 4 * lines * LINE;
        }
    }
}

#if defined(__AMX_BF16__)

// Configures the tile registers of this thread, all as 16 rows of 64 bytes, as long as it lives.
class Tiles {
  public:
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } configuration;
        _tile_loadconfig(&configuration);
    }
    ~Tiles() { _tile_release(); }
};

// As for the other types, 32 rows at a time. Tiles 0 to 3 hold sums, 4 and 5 rows of A, 6 and 7 columns of B.
template <>
inline void multiply<BFloat16>(int count, const float* a, int64_t chunks, int64_t stride, const float* b, const float*,
                               float* c) {
    constexpr int ROW = CHUNK * sizeof(float), PANEL = COLUMNS * sizeof(float);  // bytes from one row to the next
    for (int row = 0; row < count; row += 32) {
        bool both = count - row > 16;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float *rows = a + (chunk * stride + row) * CHUNK, *panel = b + chunk * CHUNK * COLUMNS;
            _tile_loadd(4, rows, ROW);
            _tile_loadd(6, panel, PANEL);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, panel + 16, PANEL);
            _tile_dpbf16ps(1, 4, 7);
            if (both) {
                _tile_loadd(5, rows + 16 * CHUNK, ROW);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        float* to = c + row * COLUMNS;
        _tile_stored(0, to, PANEL);
        _tile_stored(1, to + 16, PANEL);
        if (both) {
            _tile_stored(2, to + 16 * COLUMNS, PANEL);
            _tile_stored(3, to + 16 * COLUMNS + 16, PANEL);
        }
    }
}

#else

class Tiles {};  // there are none

#endif

}  // namespace fastddpm::FASTDDPM_ISA
