// Squared error of the predicted x_0, for the variational bound: reads x_0 and m; x_t and eps are made in registers.
//
// Traffic and precision: as kernels/x_0_error.py, its twin.
// Spec: fastddpm/reference/diffusion.py::squared_error of ::predicted_x_0 and ::add_noise with fastddpm/core/noise.py.
// Proof: tests/ops/test_x_0_error.py (bits).
#include "floats.h"
#include "philox.h"
#include "tree.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

struct Row {
    float signal, noise, cx, cm, lo, hi, scale;
};

}  // namespace

void x_0_error(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), per_sample = a.size();
    auto m = a.pointer<char>();                   // [n, per_sample] in m_dtype
    auto x_0 = a.pointer<char>();                 // like m, in x_0_dtype
    auto t = a.pointer<const int64_t>();          // [n]
    auto addresses = a.pointer<const Address>();  // [n]
    auto table = a.pointer<const Row>();          // [T]
    int64_t stream = a.size(), with_t = a.size(), m_dtype = a.size(), x_0_dtype = a.size();
    auto out = a.pointer<float>();   // [n]
    auto sums = a.pointer<float>();  // [n, blocks], of the squared errors of each block

    int64_t blocks = blocks_of(per_sample, BLOCK);
    if (call.phase == 1) {
        Share share(n, call);
        for (int64_t entry = share.first; entry < share.last; ++entry)
            out[entry] = tree_sum(sums + entry * blocks, blocks);
        return;
    }
    Share share(n * blocks, call);
    for (int64_t unit = share.first; unit < share.last; ++unit) {
        int64_t entry = unit / blocks, block = unit % blocks;
        int64_t at = entry * per_sample + block * BLOCK;
        int count = int(smaller<int64_t>(BLOCK, per_sample - block * BLOCK));
        const Row row = table[t[entry]];
        float eps[BLOCK], x[BLOCK], d[BLOCK];
        normals(addresses[entry], stream, with_t ? t[entry] : 0, block, eps);
        with_float_or_byte(x_0_dtype, [&](auto* type) {
            auto clean = reinterpret_cast<decltype(type)>(x_0) + at;
            for (int i = 0; i < count; ++i) x[i] = widen(clean[i]);
        });
        with_float(m_dtype, [&](auto* type) {
            auto output = reinterpret_cast<decltype(type)>(m) + at;
            for (int i = 0; i < count; ++i) d[i] = widen(output[i]);
        });
        for (int i = 0; i < count; ++i) {
            float x_t = row.signal * x[i] + row.noise * eps[i];
            float w = row.cx * x_t + row.cm * d[i];
            w = w < row.lo ? row.lo : w;  // NaN stays NaN
            w = w > row.hi ? row.hi : w;
            float error = row.scale * w - x[i];
            d[i] = error * error;
        }
        for (int i = count; i < BLOCK; ++i) d[i] = 0;
        sums[unit] = tree_sum_of_block(d);
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
