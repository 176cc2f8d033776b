// Fused residual h = ((h + residual) + bias) / scale, in place: reads h and residual, writes h.
//
// Traffic and precision: as kernels/residual.py, its twin.
// Spec: the same in torch, bit for bit. Proof: tests/ops/test_residual.py (bits).
#include "floats.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

template <bool BIAS, bool SCALE, class T>
void add_row(T* h, const T* residual, const float* __restrict__ bias, int64_t channels, float scale) {
#pragma GCC ivdep  // h and residual may be the same tensor
    for (int64_t c = 0; c < channels; ++c) {
        float sum = widen(h[c]) + widen(residual[c]);
        if (BIAS) sum += bias[c];
        narrow(SCALE ? sum / scale : sum, h[c]);
    }
}

}  // namespace

void residual(const Call& call) {
    Arguments a(call);
    int64_t rows = a.size(), channels = a.size();
    auto h = a.pointer<char>();            // [rows, channels] in dtype; updated in place
    auto other = a.pointer<char>();        // like h
    auto bias = a.pointer<const float>();  // [channels], or null
    float scale = float(a.real());
    Share share(rows, call);
    with_float(a.size(), [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto add = bias ? (scale == 1 ? add_row<true, false, T> : add_row<true, true, T>)
                        : (scale == 1 ? add_row<false, false, T> : add_row<false, true, T>);
        for (int64_t row = share.first; row < share.last; ++row)
            add(reinterpret_cast<T*>(h) + row * channels, reinterpret_cast<T*>(other) + row * channels, bias, channels,
                scale);
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
