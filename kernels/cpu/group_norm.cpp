// Fused group norm act((normalised(cat([x, skip]) + add) * weight + bias) * (1 + scale) + shift) * film + shift + residual:
// reads x, skip, residual and the rows, writes y.
//
// Traffic: each element of x and skip is read twice, the second time from the first-level cache, and once more to write
// y; residual once.
// Precision: fp32, rounded once. Mean and variance of each channel over a block of pixels are computed in fp32, about
// the block's mean, and combined in float64. No bit depends on the batch, the number of threads or the instruction set.
// Spec: cat, group_norm, * (1 + scale) + shift, silu, mish of torch. Proof: tests/ops/test_group_norm.py (float64),
// tests/kernels/cpu/test_equal_bits.py (bits across threads and instruction sets).
#include "activation.h"
#include "floats.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int64_t ROWS = 64;  // pixels of a block
constexpr int VECTORS = 4, CHANNELS = VECTORS * LANES;  // of a unit of work; a block of them fits the first-level cache

struct Norm {
    int64_t n, pixels, groups, channels[2];  // of x and skip
    char* y;  // [n, pixels, channels] in dtype: [x's channels, skip's channels]
    char* inputs[2];  // x and skip: [n, pixels, its channels] in dtype; skip may be null
    const float* add;  // [n, channels], rows add_stride apart, or null
    int64_t add_stride;
    const float* scale_shift;  // [n, 2, channels]: scales, then shifts; rows scale_shift_stride apart; or null
    int64_t scale_shift_stride;
    const float *weight, *bias;  // [channels]
    double eps;
    int64_t activation;
    const float*
        film;  // [n, 2, channels]: scales, then shifts; or [n, channels]: shifts; rows film_stride apart; or null
    int64_t film_stride, film_scales;  // the latter: whether it has scales
    const char* residual;  // like y, or null
    int64_t dtype;
    double* moments;  // [n, blocks, 2, channels], scratch: mean, and sum of squares about it
    float* transform;  // [n, 3, channels], scratch: y = (x - centre) * scale + shift

    explicit Norm(Arguments& a)
        : n(a.size()), pixels(a.size()), groups(a.size()), channels{a.size(), a.size()}, y(a.pointer<char>()),
          inputs{a.pointer<char>(), a.pointer<char>()}, add(a.pointer<const float>()), add_stride(a.size()),
          scale_shift(a.pointer<const float>()), scale_shift_stride(a.size()), weight(a.pointer<const float>()),
          bias(a.pointer<const float>()), eps(a.real()), activation(a.size()), film(a.pointer<const float>()),
          film_stride(a.size()), film_scales(a.size()), residual(a.pointer<const char>()), dtype(a.size()),
          moments(a.pointer<double>()), transform(a.pointer<float>()) {}

    int64_t width() const { return channels[0] + channels[1]; }
    int64_t blocks() const { return blocks_of(pixels, ROWS); }
    int64_t slices(int part) const { return blocks_of(channels[part], CHANNELS); }
};

// Statistics of the adjacent channels of COUNT vectors, the last of which has `count` channels, over the rows of a
// block, which are `stride` elements apart. Several vectors hide the latency of the additions.
template <int COUNT, class T>
void moments_of_channels(const T* x, int64_t rows, int64_t stride, int count, double* mean, double* squares) {
    auto vector = [&](int64_t row, int v) {
        const T* from = x + row * stride + v * LANES;
        return v + 1 == COUNT && count < LANES ? load(from, count) : load(from);
    };
    Lanes sum[COUNT], centre[COUNT], first[COUNT], second[COUNT];
    for (int v = 0; v < COUNT; ++v) sum[v] = first[v] = second[v] = Lanes{};
    for (int64_t row = 0; row < rows; ++row)
        for (int v = 0; v < COUNT; ++v) sum[v] += vector(row, v);
    for (int v = 0; v < COUNT; ++v) centre[v] = sum[v] / float(rows);
    for (int64_t row = 0; row < rows; ++row)
        for (int v = 0; v < COUNT; ++v) {
            Lanes off = vector(row, v) - centre[v];
            first[v] += off;
            second[v] += off * off;
        }
    for (int c = 0; c < (COUNT - 1) * LANES + count; ++c) {
        double total = first[c / LANES][c % LANES], correction = total / double(rows);
        mean[c] = double(centre[c / LANES][c % LANES]) + correction;
        squares[c] = double(second[c / LANES][c % LANES]) - correction * total;
    }
}

// Statistics of a unit of work: up to VECTORS vectors of channels of one tensor in a block of pixels.
template <class T, int COUNT = VECTORS>
void moments_of_unit(const Norm& norm, int64_t unit) {
    int64_t slices = norm.slices(0) + norm.slices(1), slice = unit % slices,
            block = unit / slices;  // counted over all entries
    int part = slice >= norm.slices(0);
    int64_t first = (slice - part * norm.slices(0)) * CHANNELS, channels = norm.channels[part], width = norm.width();
    int64_t count = smaller<int64_t>(CHANNELS, channels - first);
    if constexpr (COUNT > 1)
        if (count <= (COUNT - 1) * LANES) return moments_of_unit<T, COUNT - 1>(norm, unit);
    int64_t pixel = block % norm.blocks() * ROWS, rows = smaller(ROWS, norm.pixels - pixel);
    auto x = reinterpret_cast<const T*>(norm.inputs[part]) + (block / norm.blocks() * norm.pixels + pixel) * channels;
    double* mean = norm.moments + block * 2 * width + part * norm.channels[0] + first;
    moments_of_channels<COUNT>(x + first, rows, channels, int(count - (COUNT - 1) * LANES), mean, mean + width);
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
    const float* of_entry = norm.scale_shift ? norm.scale_shift + entry * norm.scale_shift_stride : nullptr;
    for (int64_t c = first; c < first + per_group; ++c) {
        double weight = norm.weight[c], bias = norm.bias[c];
        if (of_entry) {
            double times = 1 + double(of_entry[c]);
            weight *= times;
            bias = bias * times + double(of_entry[width + c]);
        }
        double exact = mean - (add ? double(add[c]) : 0.0), scale = weight * factor;
        centre[c] = float(exact);
        centre[width + c] = float(scale);
        centre[2 * width + c] = float(bias + (double(centre[c]) - exact) * scale);
    }
}

// Transform up to COUNT vectors of channels of a pixel, of which `count` channels are left. Args: centre, film,
// residual: of the first; the last two may be null.
template <class T, int COUNT = VECTORS>
void transform_vectors(const Norm& norm, const T* x, int64_t count, const float* centre, const float* film,
                       const T* residual, T* y) {
    if constexpr (COUNT > 1)
        if (count <= (COUNT - 1) * LANES)
            return transform_vectors<T, COUNT - 1>(norm, x, count, centre, film, residual, y);
    Lanes values[COUNT];
    auto size = [&](int v) { return v + 1 < COUNT ? LANES : int(smaller<int64_t>(LANES, count - v * LANES)); };
    for (int v = 0; v < COUNT; ++v) {
        const float *from = centre + v * LANES, *scale = from + norm.width(), *shift = scale + norm.width();
        values[v] = (load(x + v * LANES, size(v)) - load(from, size(v))) * load(scale, size(v)) + load(shift, size(v));
    }
    activate(values, norm.activation);
    if (film)
        for (int v = 0; v < COUNT; ++v) {
            const float *scale = film + v * LANES, *shift = norm.film_scales ? scale + norm.width() : scale;
            if (norm.film_scales) values[v] *= load(scale, size(v));
            values[v] += load(shift, size(v));
        }
    if (residual)
        for (int v = 0; v < COUNT; ++v) values[v] += load(residual + v * LANES, size(v));
    for (int v = 0; v < COUNT; ++v) store(values[v], y + v * LANES, size(v));
}

template <class T>
void transform_pixels(const Norm& norm, const Share& pixels) {
    int64_t width = norm.width(), entry = pixels.first / norm.pixels;
    for (int64_t pixel = pixels.first; pixel < pixels.last; ++pixel) {
        if (pixel == (entry + 1) * norm.pixels) ++entry;
        int64_t column = 0;
        for (int part = 0; part < 2; ++part) {
            int64_t channels = norm.channels[part];
            auto x = reinterpret_cast<const T*>(norm.inputs[part]) + pixel * channels;
            auto y = reinterpret_cast<T*>(norm.y) + pixel * width + column;
            auto residual = reinterpret_cast<const T*>(norm.residual) + (norm.residual ? pixel * width + column : 0);
            const float* centre = norm.transform + entry * 3 * width + column;
            const float* film = norm.film ? norm.film + entry * norm.film_stride + column : nullptr;
            for (int64_t c = 0; c < channels; c += CHANNELS)
                transform_vectors(norm, x + c, channels - c, centre + c, film ? film + c : nullptr,
                                  residual ? residual + c : nullptr, y + c);
            column += channels;
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
    with_float(norm.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (call.phase == 2) return transform_pixels<T>(norm, Share(norm.n * norm.pixels, call));
        Share share(norm.n * norm.blocks() * (norm.slices(0) + norm.slices(1)), call);
        for (int64_t unit = share.first; unit < share.last; ++unit) moments_of_unit<T>(norm, unit);
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
