// Interleaves the four phases of a polyphase upsampling into one image, and adds the bias: reads y, writes out.
//
// Traffic and precision: as kernels/interleave.py, its twin.
// Spec: the same in torch, bit for bit. Proof: tests/ops/test_interleave.py (bits).
#include "floats.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

template <class T>
void copy_pixel(const T* __restrict__ from, const float* __restrict__ bias, int64_t channels, T* __restrict__ to) {
    if (!bias) {
        std::memcpy(to, from, sizeof(T) * channels);
        return;
    }
    for (int64_t c = 0; c < channels; ++c) narrow(widen(from[c]) + bias[c], to[c]);
}

}  // namespace

void interleave(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), height = a.size(), width = a.size(), channels = a.size();  // before upsampling
    auto out = a.pointer<char>();          // [n, 2 height, 2 width, channels] in dtype
    auto y = a.pointer<char>();            // [n, height + 1, width + 1, 2, 2, channels] in dtype
    auto bias = a.pointer<const float>();  // [channels], or null
    Share share(n * 2 * height, call);
    with_float(a.size(), [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t unit = share.first; unit < share.last; ++unit) {
            int64_t entry = unit / (2 * height), row = unit % (2 * height);
            auto to = reinterpret_cast<T*>(out) + unit * 2 * width * channels;
            auto from = reinterpret_cast<T*>(y) + (entry * (height + 1) + (row + 1) / 2) * (width + 1) * 4 * channels;
            for (int64_t column = 0; column < 2 * width; ++column) {
                int64_t phase = row % 2 * 2 + column % 2;
                copy_pixel(from + ((column + 1) / 2 * 4 + phase) * channels, bias, channels, to + column * channels);
            }
        }
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
