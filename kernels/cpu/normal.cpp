// Standard normals of many samples: writes them, reads nothing but addresses.
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

    int64_t blocks = blocks_of(per_sample, BLOCK);
    Share share(n * blocks, call);
    for (int64_t unit = share.first; unit < share.last; ++unit) {
        int64_t entry = unit / blocks, block = unit % blocks;
        int64_t count = smaller<int64_t>(BLOCK, per_sample - block * BLOCK);
        float out[BLOCK];
        normals(addresses[entry], stream, t[entry], block, out);
        std::memcpy(z + entry * per_sample + block * BLOCK, out, sizeof(float) * count);
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
