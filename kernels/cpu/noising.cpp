// Fused forward noising x_0 -> x_t: reads x_0, writes x_t in the network's dtype; eps is made in registers.
//
// Traffic and precision: as kernels/noising.py, its twin.
// Spec: fastddpm/reference/diffusion.py::add_noise with fastddpm/core/noise.py.
// Proof: tests/ops/test_noising.py (bits).
#include "floats.h"
#include "philox.h"

namespace fastddpm::FASTDDPM_ISA {

void noising(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), per_sample = a.size();
    auto x_t = a.pointer<char>();                 // [n, per_sample] in x_t_dtype
    auto x_0 = a.pointer<char>();                 // like x_t, in x_0_dtype
    auto t = a.pointer<const int64_t>();          // [n]
    auto addresses = a.pointer<const Address>();  // [n]
    auto table = a.pointer<const float>();        // [T, 2]: sqrt(abar_t), sqrt(1 - abar_t)
    int64_t stream = a.size(), with_t = a.size(), x_t_dtype = a.size(), x_0_dtype = a.size();

    each_block(n, per_sample, call, [&](int64_t entry, int64_t block, int64_t at, int count) {
        float signal = table[2 * t[entry]], noise = table[2 * t[entry] + 1];
        float eps[BLOCK];
        normals(addresses[entry], stream, with_t ? t[entry] : 0, block, eps);
        with_float_or_byte(x_0_dtype, [&](auto* type) {
            auto clean = reinterpret_cast<decltype(type)>(x_0) + at;
            for (int i = 0; i < count; ++i) eps[i] = signal * widen(clean[i]) + noise * eps[i];
        });
        with_float(x_t_dtype, [&](auto* type) {
            auto noised = reinterpret_cast<decltype(type)>(x_t) + at;
            for (int i = 0; i < count; ++i) narrow(eps[i], noised[i]);
        });
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
