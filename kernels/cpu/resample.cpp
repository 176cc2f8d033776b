// Doubles the size of images by nearest neighbours, or halves it by the mean of 2 x 2 pixels: reads x, writes y.
//
// Traffic: x and y once each, a quarter of the larger one in rows that the first-level cache still holds.
// Precision: the four values of a mean are added in fp32, in the order of memory, and the result is rounded once.
// Spec: interpolate and avg_pool2d of torch, bit for bit. Proof: tests/kernels/cpu/test_program.py (bits).
#include "floats.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

template <class T>
void mean_of_pixels(const T* above, const T* below, int64_t channels, T* __restrict__ to) {
    for (int64_t c = 0; c < channels; ++c) {
        float sum = widen(above[c]) + widen(above[channels + c]) + widen(below[c]) + widen(below[channels + c]);
        narrow(sum * 0.25f, to[c]);
    }
}

}  // namespace

void resample(const Call& call) {
    Arguments a(call);
    int64_t n = a.size(), height = a.size(), width = a.size(), channels = a.size(), up = a.size();  // of x
    auto y =
        a.pointer<char>();  // [n, 2 height, 2 width, channels] in dtype if up, else [n, height / 2, width / 2, ...]
    auto x = a.pointer<char>();  // [n, height, width, channels] in dtype; both sides even unless up
    int64_t rows = up ? 2 * height : height / 2, columns = up ? 2 * width : width / 2;
    Share share(n * rows, call);
    with_float(a.size(), [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t unit = share.first; unit < share.last; ++unit) {
            int64_t entry = unit / rows, row = unit % rows;
            auto to = reinterpret_cast<T*>(y) + unit * columns * channels;
            auto from = reinterpret_cast<const T*>(x) + (entry * height + (up ? row / 2 : 2 * row)) * width * channels;
            for (int64_t column = 0; column < columns; ++column, to += channels) {
                if (up) {
                    std::memcpy(to, from + column / 2 * channels, sizeof(T) * channels);
                } else {
                    const T* pixel = from + 2 * column * channels;
                    mean_of_pixels(pixel, pixel + width * channels, channels, to);
                }
            }
        }
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
