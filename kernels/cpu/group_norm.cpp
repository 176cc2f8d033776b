// Fused group norm silu(normalised(cat([x, skip]) + add) * weight + bias): reads x, skip and add, writes y.
//
// Traffic: each input element is read twice, the second time from the first-level cache, and once more to write y.
// Precision: fp32, rounded once. Mean and variance of each channel over a block of pixels are computed in fp32, about
// the block's mean, and combined in float64. No bit depends on the batch, the number of threads or the instruction set.
// Spec: cat, group_norm and silu of torch. Proof: tests/ops/test_group_norm.py (float64; bits across threads and
// instruction sets).
#include "floats.h"
#include "silu.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int64_t ROWS = 64;  // pixels of a block, so that 64 channels of them fit the first-level cache

struct Norm {
    int64_t n, pixels, groups, channels[2];  // of x and skip
    char* y;  // [n, pixels, channels] in dtype: [x's channels, skip's channels]
    char* inputs[2];  // x and skip: [n, pixels, its channels] in dtype; skip may be null
    const float* add;  // [n, channels], rows add_stride apart, or null
    int64_t add_stride;
    const float *weight, *bias;  // [channels]
    double eps;
    int64_t silu, dtype;
    double* moments;  // [n, blocks, 2, channels], scratch: mean, and sum of squares about it
    float* transform;  // [n, 3, channels], scratch: y = (x - centre) * scale + shift

    explicit Norm(Arguments& a)
        : n(a.size()), pixels(a.size()), groups(a.size()), channels{a.size(), a.size()}, y(a.pointer<char>()),
          inputs{a.pointer<char>(), a.pointer<char>()}, add(a.pointer<const float>()), add_stride(a.size()),
          weight(a.pointer<const float>()), bias(a.pointer<const float>()), eps(a.real()), silu(a.size()),
          dtype(a.size()), moments(a.pointer<double>()), transform(a.pointer<float>()) {}

    int64_t width() const { return channels[0] + channels[1]; }
    int64_t blocks() const { return blocks_of(pixels, ROWS); }
};

template <class T>
Lanes load(const T* from, int count = LANES) {
    float widened[LANES] = {};
    for (int i = 0; i < count; ++i) widened[i] = widen(from[i]);
    Lanes lanes;
    std::memcpy(&lanes, widened, sizeof lanes);
    return lanes;
}

template <>
inline Lanes load<float>(const float* from, int count) {
    Lanes lanes{};
    std::memcpy(&lanes, from, sizeof(float) * count);
    return lanes;
}

// Statistics of the adjacent channels of VECTORS vectors, the last of which has `count` channels, over the rows of a
// block, which are `stride` elements apart. Several vectors hide the latency of the additions.
template <int VECTORS, class T>
void moments_of_channels(const T* x, int64_t rows, int64_t stride, int count, double* mean, double* squares) {
    auto vector = [&](int64_t row, int v) {
        const T* from = x + row * stride + v * LANES;
        return v + 1 == VECTORS && count < LANES ? load(from, count) : load(from);
    };
    Lanes sum[VECTORS], centre[VECTORS], first[VECTORS], second[VECTORS];
    for (int v = 0; v < VECTORS; ++v) sum[v] = first[v] = second[v] = Lanes{};
    for (int64_t row = 0; row < rows; ++row)
        for (int v = 0; v < VECTORS; ++v) sum[v] += vector(row, v);
    for (int v = 0; v < VECTORS; ++v) centre[v] = sum[v] / float(rows);
    for (int64_t row = 0; row < rows; ++row)
        for (int v = 0; v < VECTORS; ++v) {
            Lanes off = vector(row, v) - centre[v];
            first[v] += off;
            second[v] += off * off;
        }
    for (int c = 0; c < (VECTORS - 1) * LANES + count; ++c) {
        double total = first[c / LANES][c % LANES], correction = total / double(rows);
        mean[c] = double(centre[c / LANES][c % LANES]) + correction;
        squares[c] = double(second[c / LANES][c % LANES]) - correction * total;
    }
}

template <class T>
void moments_of_block(const Norm& norm, int64_t entry, int64_t block) {
    int64_t first = block * ROWS, rows = smaller(ROWS, norm.pixels - first), width = norm.width();
    double* mean = norm.moments + (entry * norm.blocks() + block) * 2 * width;
    for (int part = 0; part < 2; ++part) {
        int64_t channels = norm.channels[part];
        auto x = reinterpret_cast<const T*>(norm.inputs[part]) + (entry * norm.pixels + first) * channels;
        int64_t c = 0;
        for (; c + 4 * LANES <= channels; c += 4 * LANES)
            moments_of_channels<4>(x + c, rows, channels, LANES, mean + c, mean + width + c);
        for (; c < channels; c += LANES)
            moments_of_channels<1>(x + c, rows, channels, int(smaller<int64_t>(LANES, channels - c)), mean + c,
                                   mean + width + c);
        mean += channels;
    }
}

// The centre, scale and shift of the channels of one group of an entry, from the moments of all blocks.
void transform_of_group(const Norm& norm, int64_t entry, int64_t group) {
    int64_t width = norm.width(), per_group = width / norm.groups, first = group * per_group, blocks = norm.blocks();
    const double* moments = norm.moments + entry * blocks * 2 * width;
    const float* add = norm.add ? norm.add + entry * norm.add_stride : nullptr;
    double pixels = double(norm.pixels), sum = 0, squares = 0;
    auto rows = [&](int64_t block) { return double(smaller(ROWS, norm.pixels - block * ROWS)); };
    auto mean_of = [&](int64_t block, int64_t c) {
        return moments[block * 2 * width + c] + (add ? double(add[c]) : 0.0);
    };
    for (int64_t block = 0; block < blocks; ++block) {
        double part = 0;
        for (int64_t c = first; c < first + per_group; ++c) part += mean_of(block, c);
        sum += rows(block) * part;
    }
    double mean = sum / (pixels * double(per_group));
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t c = first; c < first + per_group; ++c) {
            double off = mean_of(block, c) - mean;
            squares += moments[(block * 2 + 1) * width + c] + rows(block) * (off * off);
        }
    double factor = 1 / __builtin_sqrt(squares / (pixels * double(per_group)) + norm.eps);
    float* centre = norm.transform + entry * 3 * width;
    for (int64_t c = first; c < first + per_group; ++c) {
        double exact = mean - (add ? double(add[c]) : 0.0), scale = norm.weight[c] * factor;
        centre[c] = float(exact);
        centre[width + c] = float(scale);
        centre[2 * width + c] = float(norm.bias[c] + (double(centre[c]) - exact) * scale);
    }
}

template <bool SILU, class T>
void transform_row(const T* __restrict__ x, int64_t channels, const float* __restrict__ centre,
                   const float* __restrict__ scale, const float* __restrict__ shift, T* __restrict__ y) {
    for (int64_t c = 0; c < channels; ++c) {
        float value = (widen(x[c]) - centre[c]) * scale[c] + shift[c];
        narrow(SILU ? silu(value) : value, y[c]);
    }
}

template <class T>
void transform_block(const Norm& norm, int64_t entry, int64_t block) {
    int64_t first = block * ROWS, rows = smaller(ROWS, norm.pixels - first), width = norm.width();
    const float* centre = norm.transform + entry * 3 * width;
    for (int64_t pixel = entry * norm.pixels + first, end = pixel + rows; pixel < end; ++pixel) {
        int64_t offset = 0;
        for (int part = 0; part < 2; ++part) {
            int64_t channels = norm.channels[part];
            auto x = reinterpret_cast<const T*>(norm.inputs[part]) + pixel * channels;
            auto y = reinterpret_cast<T*>(norm.y) + pixel * width + offset;
            const float* at = centre + offset;
            (norm.silu ? transform_row<true, T> : transform_row<false, T>)(x, channels, at, at + width, at + 2 * width,
                                                                           y);
            offset += channels;
        }
    }
}

}  // namespace

void group_norm(const Call& call) {
    Arguments a(call);
    const Norm norm(a);
    if (call.phase == 1) {
        Share share(norm.n * norm.groups, call);
        for (int64_t unit = share.first; unit < share.last; ++unit)
            transform_of_group(norm, unit / norm.groups, unit % norm.groups);
        return;
    }
    int64_t blocks = norm.blocks();
    Share share(norm.n * blocks, call);
    with_float(norm.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int64_t unit = share.first; unit < share.last; ++unit)
            (call.phase == 0 ? moments_of_block<T> : transform_block<T>)(norm, unit / blocks, unit % blocks);
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
