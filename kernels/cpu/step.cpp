// Fused reverse step x_t -> x_{t-1}: reads x and m, writes x and optionally a copy; z is made in registers.
//
// Traffic and precision: as kernels/step.py, its twin.
// Spec: fastddpm/reference/diffusion.py::update with fastddpm/core/noise.py, stream 0. Proof: tests/ops/test_step.py.
#include "floats.h"
#include "philox.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

struct Row {  // fastddpm.core.table.COLUMNS
    float cx, cm, lo, hi, A, B, C, S;
};

// The step of `count` elements without its noise: returns x_{t-1} in `next`.
template <class M>
void mean_of(const Row& row, bool clip, int count, const float* x, const M* m, float* next) {
    float widened[BLOCK];
    for (int i = 0; i < count; ++i) widened[i] = widen(m[i]);
    if (clip) {
        for (int i = 0; i < count; ++i) {
            float x_0 = row.cx * x[i] + row.cm * widened[i];
            x_0 = x_0 < row.lo ? row.lo : x_0;  // NaN stays NaN
            x_0 = x_0 > row.hi ? row.hi : x_0;
            next[i] = (row.A * x_0 + row.B * x[i]) + row.C * widened[i];
        }
    } else {
        for (int i = 0; i < count; ++i) next[i] = row.B * x[i] + row.C * widened[i];
    }
}

template <class Copy>
void store_copy(int count, const float* x, Copy* copy) {
    for (int i = 0; i < count; ++i) narrow(x[i], copy[i]);
}

bool all_finite(int count, const float* x) {
    uint32_t bad = 0;
    for (int i = 0; i < count; ++i) bad |= (bits_as<uint32_t>(x[i]) & 0x7F800000) == 0x7F800000;
    return !bad;
}

void raise_to(int32_t* flag, int32_t pos) {  // other threads may raise it too
    int32_t seen = __atomic_load_n(flag, __ATOMIC_RELAXED);
    while (seen < pos && !__atomic_compare_exchange_n(flag, &seen, pos, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

}  // namespace

void step(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), per_sample = a.size();
    auto x = a.pointer<float>();               // [n, per_sample], updated in place
    auto m = a.pointer<const char>();          // like x, in m_dtype
    auto rows = a.pointer<const Row>();        // [S]
    auto timesteps = a.pointer<const int32_t>();  // [S]
    auto positions = a.pointer<const int32_t>();  // [n]
    auto addresses = a.pointer<const Address>();  // [n]
    auto copy = a.pointer<char>();             // like x in copy_dtype, or null
    auto bad = a.pointer<int32_t>();           // [n], or null
    int64_t clip = a.size(), m_dtype = a.size(), copy_dtype = a.size();

    each_block(n, per_sample, call, [&](int64_t entry, int64_t block, int64_t at, int count) {
        int32_t pos = positions[entry];
        const Row row = rows[pos];
        float next[BLOCK], z[BLOCK];
        with_float(m_dtype, [&](auto* type) {
            mean_of(row, clip, count, x + at, reinterpret_cast<decltype(type)>(const_cast<char*>(m)) + at, next);
        });
        if (row.S != 0) {
            normals(addresses[entry], STEP_STREAM, timesteps[pos], block, z);
            for (int i = 0; i < count; ++i) next[i] += row.S * z[i];
        }
        std::memcpy(x + at, next, sizeof(float) * count);
        if (copy)
            with_float(copy_dtype,
                       [&](auto* type) { store_copy(count, next, reinterpret_cast<decltype(type)>(copy) + at); });
        if (bad && !all_finite(count, next)) raise_to(bad + entry, pos);
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
