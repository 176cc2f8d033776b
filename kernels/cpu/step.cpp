// Fused reverse steps x_t -> x_{t-1}: read x and m, write x and optionally a copy; z is made in registers.
//
// Traffic and precision: as kernels/step.py and kernels/conditional_step.py, their twins.
// Spec: fastddpm/reference/diffusion.py::update, guided, deviation, replaced with fastddpm/core/noise.py, streams 0 and
// 4. Proof: tests/ops/test_step.py, tests/ops/test_conditional_step.py.
#include "step.h"

#include "exponential.h"
#include "floats.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

template <class Copy>
void store_copy(int count, const float* x, Copy* copy) {
    for (int i = 0; i < count; ++i) narrow(x[i], copy[i]);
}

// How the outputs for an entry lie in memory: [pixels, halves, channels].
struct Outputs {
    int64_t channels, halves, dtype;

    // Return elements of one half as floats, from element `first` of the entry on. m: the outputs of the entry.
    void load(const char* m, int64_t first, int half, int count, float* values) const {
        with_float(dtype, [&](auto* type) {
            auto at = reinterpret_cast<decltype(type)>(const_cast<char*>(m)) + half * channels;
            if (halves == 1) {
                for (int i = 0; i < count; ++i) values[i] = widen(at[first + i]);
                return;
            }
            int64_t channel = first % channels;
            at += (first - channel) * halves;
            for (int i = 0; i < count; ++i) {
                values[i] = widen(at[channel]);
                if (++channel < channels) continue;
                channel = 0;
                at += halves * channels;
            }
        });
    }
};

void guide(float scale, int count, const float* without, float* m) {
    for (int i = 0; i < count; ++i) m[i] = without[i] + scale * (m[i] - without[i]);
}

enum Learned : int64_t { FIXED, VARIANCE, RANGE };

// Turn outputs for the variance into standard deviations. v: [BLOCK], of which `count` are outputs.
void deviations(const Row& row, int64_t learned, int count, float* v) {
    if (learned == VARIANCE) {
        for (int i = 0; i < count; ++i) v[i] = row.S * __builtin_sqrtf(v[i]);
        return;
    }
    std::memset(v + count, 0, sizeof(float) * (BLOCK - count));
    for (int i = 0; i < count; i += LANES) {
        Lanes a = row.L + row.V * load(v + i);
        a = a > MOST_EXPONENT ? all(MOST_EXPONENT) : a;  // NaN stays NaN
        store(row.S * Exponentials<1>({a}).value(0), v + i);
    }
}

}  // namespace

void step(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), per_sample = a.size();
    auto x = a.pointer<float>();  // [n, per_sample], updated in place
    auto m = a.pointer<const char>();  // like x, in m_dtype
    auto rows = a.pointer<const Row>();  // [S]
    auto timesteps = a.pointer<const int32_t>();  // [S]
    auto positions = a.pointer<const int32_t>();  // [n]
    auto addresses = a.pointer<const Address>();  // [n]
    auto copy = a.pointer<char>();  // like x in copy_dtype, or null
    auto bad = a.pointer<int32_t>();  // [n], or null
    int64_t clip = a.size(), m_dtype = a.size(), copy_dtype = a.size();

    each_block(n, per_sample, call, [&](int64_t entry, int64_t block, int64_t at, int count) {
        int32_t pos = positions[entry];
        const Row row = rows[pos];
        float widened[BLOCK], next[BLOCK];
        with_float(m_dtype, [&](auto* type) {
            auto values = reinterpret_cast<decltype(type)>(const_cast<char*>(m)) + at;
            for (int i = 0; i < count; ++i) widened[i] = widen(values[i]);
        });
        reverse_step(row, clip, addresses[entry], timesteps[pos], block, count, x + at, widened, next);
        std::memcpy(x + at, next, sizeof(float) * count);
        if (copy)
            with_float(copy_dtype,
                       [&](auto* type) { store_copy(count, next, reinterpret_cast<decltype(type)>(copy) + at); });
        if (bad && !all_finite(count, next)) raise_to(bad + entry, pos);
    });
}

void conditional_step(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), per_sample = a.size();
    auto x = a.pointer<float>();  // [n, per_sample], updated in place
    auto m = a.pointer<const char>();  // [n or 2n, pixels, halves, channels]
    auto rows = a.pointer<const Row>();  // [S]
    auto timesteps = a.pointer<const int32_t>();  // [S]
    auto positions = a.pointer<const int32_t>();  // [n]
    auto addresses = a.pointer<const Address>();  // [n]
    auto guidance = a.pointer<const float>();  // [n], or null
    auto known = a.pointer<const float>();  // like x, or null
    auto mask = a.pointer<const uint8_t>();  // like x, or null: where known replaces x
    auto bad = a.pointer<int32_t>();  // [n], or null
    int64_t channels = a.size(), halves = a.size(), m_dtype = a.size();
    int64_t clip = a.size(), guide_variance = a.size(), learned = a.size();
    Outputs outputs{channels, halves, m_dtype};
    int64_t bytes = per_sample * halves * (m_dtype == FLOAT32 ? 4 : 2);  // of the outputs for an entry

    each_block(n, per_sample, call, [&](int64_t entry, int64_t block, int64_t at, int count) {
        int32_t pos = positions[entry];
        const Row row = rows[pos];
        const char *with = m + entry * bytes, *without = m + (n + entry) * bytes;
        float output[BLOCK], v[BLOCK], next[BLOCK], z[BLOCK];
        outputs.load(with, block * BLOCK, 0, count, output);
        if (guidance) {
            outputs.load(without, block * BLOCK, 0, count, v);
            guide(guidance[entry], count, v, output);
        }
        mean_of(row, clip, count, x + at, output, next);
        if (row.S != 0) {
            normals(addresses[entry], STEP_STREAM, timesteps[pos], block, z);
            if (learned != FIXED) {
                outputs.load(with, block * BLOCK, 1, count, v);
                if (guidance && guide_variance) {
                    outputs.load(without, block * BLOCK, 1, count, output);
                    guide(guidance[entry], count, output, v);
                }
                deviations(row, learned, count, v);
                for (int i = 0; i < count; ++i) next[i] += v[i] * z[i];
            } else {
                for (int i = 0; i < count; ++i) next[i] += row.S * z[i];
            }
        }
        if (known) {
            for (int i = 0; i < count; ++i) output[i] = row.P * known[at + i];
            if (row.Q != 0) {
                normals(addresses[entry], KNOWN_STREAM, timesteps[pos], block, z);
                for (int i = 0; i < count; ++i) output[i] += row.Q * z[i];
            }
            for (int i = 0; i < count; ++i) next[i] = mask[at + i] ? output[i] : next[i];
        }
        std::memcpy(x + at, next, sizeof(float) * count);
        if (bad && !all_finite(count, next)) raise_to(bad + entry, pos);
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
