// The training loss and its gradient: both read m, and x_0 if the target contains it; eps is made in registers.
//
// Traffic and precision: as kernels/eps_loss.py, its twin.
// Spec: fastddpm/reference/diffusion.py::squared_error of ::target with fastddpm/core/noise.py.
// Proof: tests/ops/test_eps_loss.py (bits, and the gradient against float64).
#include "floats.h"
#include "philox.h"
#include "tree.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

enum Predicts : int64_t { EPSILON, SAMPLE, V_PREDICTION };  // fastddpm.ops.library.PREDICTIONS

struct Inputs {
    int64_t n, per_sample;
    char *m, *x_0;             // [n, per_sample] in m_dtype, x_0_dtype
    const int64_t* t;          // [n]
    const Address* addresses;  // [n]
    const float* table;        // [T, 2]: sqrt(abar_t), sqrt(1 - abar_t); read for v prediction
    int64_t predicts, stream, with_t, m_dtype, x_0_dtype;

    explicit Inputs(Arguments& a)
        : n(a.size()), per_sample(a.size()), m(a.pointer<char>()), x_0(a.pointer<char>()),
          t(a.pointer<const int64_t>()), addresses(a.pointer<const Address>()), table(a.pointer<const float>()),
          predicts(a.size()), stream(a.size()), with_t(a.size()), m_dtype(a.size()), x_0_dtype(a.size()) {}

    int64_t blocks() const { return blocks_of(per_sample, BLOCK); }

    // m - target of one block, zeros beyond the sample.
    void error(int64_t entry, int64_t block, float (&d)[BLOCK]) const {
        int64_t at = entry * per_sample + block * BLOCK;
        int count = int(smaller<int64_t>(BLOCK, per_sample - block * BLOCK));
        float x[BLOCK], target[BLOCK];
        if (predicts != EPSILON)
            with_float_or_byte(x_0_dtype, [&](auto* type) {
                auto clean = reinterpret_cast<decltype(type)>(x_0) + at;
                for (int i = 0; i < count; ++i) x[i] = widen(clean[i]);
            });
        if (predicts == SAMPLE) {
            std::memcpy(target, x, sizeof(float) * count);
        } else {
            normals(addresses[entry], stream, with_t ? t[entry] : 0, block, target);
        }
        if (predicts == V_PREDICTION) {
            float signal = table[2 * t[entry]], noise = table[2 * t[entry] + 1];
            for (int i = 0; i < count; ++i) target[i] = signal * target[i] - noise * x[i];
        }
        with_float(m_dtype, [&](auto* type) {
            auto output = reinterpret_cast<decltype(type)>(m) + at;
            for (int i = 0; i < count; ++i) d[i] = widen(output[i]) - target[i];
        });
        for (int i = count; i < BLOCK; ++i) d[i] = 0;
    }
};

}  // namespace

void eps_loss(const Call& call) {
    Arguments a(call);
    Inputs inputs(a);
    auto out = a.pointer<float>();   // [n]
    auto sums = a.pointer<float>();  // [n, blocks], of the squared errors of each block
    int64_t blocks = inputs.blocks();
    if (call.phase == 0) {
        Share share(inputs.n * blocks, call);
        for (int64_t unit = share.first; unit < share.last; ++unit) {
            float d[BLOCK];
            inputs.error(unit / blocks, unit % blocks, d);
            for (int i = 0; i < BLOCK; ++i) d[i] = d[i] * d[i];
            sums[unit] = tree_sum_of_block(d);
        }
        return;
    }
    Share share(inputs.n, call);
    for (int64_t entry = share.first; entry < share.last; ++entry) out[entry] = tree_sum(sums + entry * blocks, blocks);
}

void eps_loss_backward(const Call& call) {
    Arguments a(call);
    Inputs inputs(a);
    auto out = a.pointer<char>();           // like m: the gradient
    auto gradient = a.pointer<const float>();  // [n]: of each entry's loss
    int64_t blocks = inputs.blocks();
    Share share(inputs.n * blocks, call);
    for (int64_t unit = share.first; unit < share.last; ++unit) {
        int64_t entry = unit / blocks, block = unit % blocks;
        int count = int(smaller<int64_t>(BLOCK, inputs.per_sample - block * BLOCK));
        float d[BLOCK], twice = 2 * gradient[entry];
        inputs.error(entry, block, d);
        with_float(inputs.m_dtype, [&](auto* type) {
            auto to = reinterpret_cast<decltype(type)>(out) + entry * inputs.per_sample + block * BLOCK;
            for (int i = 0; i < count; ++i) narrow(twice * d[i], to[i]);
        });
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
