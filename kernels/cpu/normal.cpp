// Standard normals of many samples: writes them, reads t and addresses alone.
//
// Traffic: 4 bytes per element. Precision: the noise standard.
// Spec: fastddpm/core/noise.py::normal. Proof: tests/ops/test_normal.py (bits).
#include "philox.h"

namespace fastddpm::FASTDDPM_ISA {

void normal(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), per_sample = a.size();
    auto z = a.pointer<float>();                  // [n, per_sample]
    auto t = a.pointer<const int64_t>();          // [n]
    auto addresses = a.pointer<const Address>();  // [n]
    int64_t stream = a.size();

    each_block(n, per_sample, call, [&](int64_t entry, int64_t block, int64_t at, int count) {
        float out[BLOCK];
        normals(addresses[entry], stream, t[entry], block, out);
        std::memcpy(z + at, out, sizeof(float) * count);
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
