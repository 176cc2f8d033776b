// The noise standard in C++: standard normals of one block of a sample.
//
// Precision: 32-bit integers and IEEE binary32 in the written order.
// Spec: fastddpm/core/noise.py, the same operations in torch. Proof: tests/kernels/test_philox.py (bits).
#pragma once

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

constexpr int BLOCK = 1024;  // elements of a sample that a kernel computes at a time
constexpr int64_t STEP_STREAM = 0;  // fastddpm.core.noise.STEP
constexpr int64_t KNOWN_STREAM = 4;  // fastddpm.core.noise.KNOWN

// Call function(entry, block, at, count) for each block of a thread's share of n entries: `at` is the position of its
// first element in [n, per_sample], and `count` how many of its BLOCK elements exist.
template <class Function>
void each_block(int64_t n, int64_t per_sample, const Call& call, Function function) {
    int64_t blocks = blocks_of(per_sample, BLOCK);
    Share share(n * blocks, call);
    for (int64_t unit = share.first; unit < share.last; ++unit) {
        int64_t entry = unit / blocks, block = unit % blocks;
        int count = int(smaller<int64_t>(BLOCK, per_sample - block * BLOCK));
        function(entry, block, entry * per_sample + block * BLOCK, count);
    }
}

struct Address {
    int64_t seed, sample;
};

// Philox4x32-10: the four words of a counter under a key.
inline void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        uint64_t p0 = uint64_t(c[0]) * 0xD2511F53, p1 = uint64_t(c[2]) * 0xCD9E8D57;
        c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
        c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
        c[1] = uint32_t(p1);
        c[3] = uint32_t(p0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

inline float flip_sign(float x, uint32_t v) { return bits_as<float>(bits_as<uint32_t>(x) ^ (v & 0x80000000)); }

// Two words -> (r cos a, r sin a).
inline void box_muller(uint32_t u, uint32_t v, float& cos_normal, float& sin_normal) {
    float f = float(u) + 0.5f;
    int32_t i = bits_as<int32_t>(f) - 0x3F3504F3;
    int32_t e = (i >> 23) - 32;
    float m = bits_as<float>((i & 0x007FFFFF) + 0x3F3504F3) - 1;
    float z = m * m;
    float p = 7.0376836292e-2f;
    p = p * m + -1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m + -1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m + -1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m + -2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    float ln = ((p * m) * z - 0.5f * z) + m;
    ln = ln + float(e) * 0.6931471805599453f;
    float r = __builtin_sqrtf(-2 * ln);

    float w = float(int32_t(v << 2) >> 8) * float(1.5707963267948966 / (1 << 24));
    float w2 = w * w;
    float s = ((-1.9515295891e-4f * w2 + 8.3321608736e-3f) * w2 + -1.6666654611e-1f) * w2 * w + w;
    float c = ((2.443315711809948e-5f * w2 + -1.388731625493765e-3f) * w2 + 4.166664568298827e-2f) * (w2 * w2) -
              0.5f * w2 + 1;
    bool odd = v & 0x40000000;  // the quadrant v >> 30 is odd
    cos_normal = r * flip_sign(odd ? s : c, v + 0x40000000);
    sin_normal = r * flip_sign(odd ? c : s, v);
}

// Write BLOCK normals of a sample, from element block * BLOCK on.
inline void normals(const Address& address, int64_t stream, int64_t t, int64_t block, float* __restrict__ out) {
    constexpr int QUADS = BLOCK / 4;
    uint32_t words[4][QUADS];
    uint32_t first = uint32_t(block * QUADS), sample = uint32_t(address.sample);
    uint32_t high = uint32_t((address.sample >> 32) + (stream << 24));
    uint32_t k0 = uint32_t(address.seed), k1 = uint32_t(address.seed >> 32);
    for (int i = 0; i < QUADS; ++i) {
        uint32_t c[4] = {first + uint32_t(i), uint32_t(t), sample, high};
        philox(c, k0, k1);
        for (int k = 0; k < 4; ++k) words[k][i] = c[k];
    }
    float z[4][QUADS];
    for (int k = 0; k < 4; k += 2)
        for (int i = 0; i < QUADS; ++i) box_muller(words[k][i], words[k + 1][i], z[k][i], z[k + 1][i]);
    for (int i = 0; i < QUADS; ++i)
        for (int k = 0; k < 4; ++k) out[4 * i + k] = z[k][i];
}

}  // namespace fastddpm::FASTDDPM_ISA
