// Convolution with everything that follows it: y = ((x * weights + bias) + residual) / scale.
//
// Two methods, both around a matrix product. Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2015, arXiv:1509.09308) takes
// 16 multiplications for 2 x 2 outputs instead of 36, for 3 x 3 kernels of stride 1; and 9 if nearest neighbours double
// the input first: the other 7 would multiply differences of equal pixels, which are 0. The other method gathers the
// inputs of each output into a row of a matrix, for all kernels and strides. Its input may be two tensors, whose
// channels follow each other, and its outputs may lie apart, as the four phases of an upsampling do.
// Traffic: x once for each block of panels, weights once for each block of outputs, residual and y once.
// Precision: sums in fp32, products fused with sums where the CPU can; in bf16 products of bf16 numbers, rounded once.
// Each output is summed in a fixed order, so no bit depends on the batch or on the number of threads.
// Spec: conv2d of torch. Proof: tests/kernels/cpu/test_program.py (float64; bits across threads and batches).
#include "division.h"
#include "gemm.h"
#include "scratch.h"

namespace fastddpm::FASTDDPM_ISA {

int columns() { return COLUMNS; }

bool multiplies_bfloat16() { return MULTIPLIES<BFloat16>; }

namespace {

template <class T>
struct Convolution {
    int64_t n, height, width, channels[2];  // of x and what follows it
    int64_t out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride, top, left;  // the last two: padding
    const T* inputs[2];  // [n, height, width, channels]; the second may be null
    const float* weights;  // packed
    const float* bias;  // [out_channels], or null
    const T* residual;  // like y, or null
    T* y;  // [n, out_height, out_width, out_channels]
    int64_t entry_stride, row_stride, column_stride;  // of y and residual, in elements
    float scale;

    explicit Convolution(Arguments& a)
        : n(a.size()), height(a.size()), width(a.size()), channels{a.size(), a.size()}, out_height(a.size()),
          out_width(a.size()), out_channels(a.size()), kernel_height(a.size()), kernel_width(a.size()),
          stride(a.size()), top(a.size()), left(a.size()), inputs{a.pointer<const T>(), a.pointer<const T>()},
          weights(a.pointer<const float>()), bias(a.pointer<const float>()), residual(a.pointer<const T>()),
          y(a.pointer<T>()), entry_stride(a.size()), row_stride(a.size()), column_stride(a.size()),
          scale(float(a.real())) {}

    int64_t panels() const { return blocks_of(out_channels, COLUMNS); }
    int64_t depth() const { return kernel_height * kernel_width * (channels[0] + channels[1]); }
    int64_t chunks() const { return blocks_of(depth(), CHUNK * PER_WORD<T>); }

    // Store the sums of up to COLUMNS channels of one output.
    void store(int64_t entry, int64_t row, int64_t column, int64_t panel, const float* sums) const {
        int64_t first = panel * COLUMNS;
        int count = int(smaller<int64_t>(COLUMNS, out_channels - first));
        int64_t at = entry * entry_stride + row * row_stride + column * column_stride + first;
        const float* shift = bias ? bias + first : nullptr;
        const T* other = residual ? residual + at : nullptr;
        if (count == COLUMNS) return store_channels(COLUMNS, sums, shift, other, y + at);
        store_channels(count, sums, shift, other, y + at);
    }

    void store_channels(int count, const float* sums, const float* shift, const T* other, T* to) const {
        float values[COLUMNS];
        for (int c = 0; c < count; ++c) values[c] = sums[c];
        if (shift)
            for (int c = 0; c < count; ++c) values[c] += shift[c];
        if (other)
            for (int c = 0; c < count; ++c) values[c] += widen(other[c]);
        if (scale != 1)
            for (int c = 0; c < count; ++c) values[c] /= scale;
        for (int c = 0; c < count; ++c) narrow(values[c], to[c]);
    }
};

// Where the index-th of n images' outputs (or tiles) is, and then those after it.
struct Place {
    int64_t height, width, entry, row, column;

    Place(int64_t index, int64_t height, int64_t width)
        : height(height), width(width), entry(index / width / height), row(index / width % height),
          column(index % width) {}
    void next() {
        if (++column < width) return;
        column = 0;
        if (++row < height) return;
        row = 0;
        ++entry;
    }
};

// Row `row` of the matrix: the inputs of one output, tap by tap, padded with zeros.
template <class T>
void gather(const Convolution<T>& conv, const Place& place, float* to, int64_t stride) {
    constexpr int64_t LENGTH = CHUNK * PER_WORD<T>;  // of a chunk
    int64_t at = 0;
    auto append = [&](const T* from, int64_t count) {
        while (count > 0) {
            int64_t offset = at % LENGTH, part = smaller(LENGTH - offset, count);
            T* target = reinterpret_cast<T*>(to + at / LENGTH * stride * CHUNK) + offset;
            if (part == LENGTH && from)
                std::memcpy(target, from, sizeof(T) * LENGTH);
            else
                for (int64_t i = 0; i < part; ++i) target[i] = from ? from[i] : T{};
            at += part;
            count -= part;
            if (from) from += part;
        }
    };
    // The taps of a row of the kernel are adjacent in memory, except where a second tensor's channels come in between.
    int64_t together = conv.inputs[1] ? 1 : conv.kernel_width;
    for (int64_t i = 0; i < conv.kernel_height; ++i)
        for (int64_t j = 0; j < conv.kernel_width; j += together) {
            int64_t y = place.row * conv.stride + i - conv.top, x = place.column * conv.stride + j - conv.left;
            bool inside = y >= 0 && y < conv.height;
            int64_t first = inside ? smaller(larger<int64_t>(-x, 0), together) : together;  // taps before the image
            int64_t last = larger(smaller(conv.width - x, together), first);
            int64_t pixel = (place.entry * conv.height + y) * conv.width + x + first;
            for (int part = 0; part < 2; ++part) {
                int64_t channels = conv.channels[part];
                append(nullptr, first * channels);
                if (last > first) append(conv.inputs[part] + pixel * channels, (last - first) * channels);
                append(nullptr, (together - last) * channels);
            }
        }
    append(nullptr, conv.chunks() * LENGTH - at);
}

template <class T>
void convolve_gathered(const Convolution<T>& conv, const Call& call) {
    int64_t total = conv.n * conv.out_height * conv.out_width, chunks = conv.chunks();
    int64_t depth = chunks * CHUNK;
    Division division(total, depth, depth, conv.panels(), depth * COLUMNS, call.threads);
    int64_t stride = division.rows | 1;  // odd: an even one would map many chunks to the same sets of the cache
    float* a = scratch.floats((stride * chunks + SLACK) * CHUNK + (stride + SLACK) * COLUMNS);
    float* c = a + (stride * chunks + SLACK) * CHUNK;
    [[maybe_unused]] Tiles tiles;
    division.each(total, conv.panels(), call, [&](int64_t first, int count, int64_t panel, int64_t last) {
        Place place(first, conv.out_height, conv.out_width);
        for (int i = 0; i < count; ++i, place.next()) gather(conv, place, a + i * CHUNK, stride);
        for (; panel < last; ++panel) {
            const float* weights = conv.weights + panel * depth * COLUMNS;
            multiply<T>(count, a, chunks, stride, weights, weights + depth * COLUMNS, c);
            Place output(first, conv.out_height, conv.out_width);
            for (int i = 0; i < count; ++i, output.next())
                conv.store(output.entry, output.row, output.column, panel, c + i * COLUMNS);
        }
    });
}

// Winograd's method in one dimension: the transform of 4 inputs, and that of their products into 2 outputs. In a
// doubled image the second and the third input are equal. SIDE = 3 keeps one of them, leaves out the product of their
// difference, and leaves the factor 2 of their sum to the kernel.
template <int SIDE>
void transform_inputs(const Lanes (&d)[SIDE], Lanes (&t)[SIDE]) {
    if constexpr (SIDE == 4)
        t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
    else
        t[0] = d[0] - d[1], t[1] = d[1], t[2] = d[1] - d[2];
}

template <int SIDE>
void transform_products(const Lanes (&m)[SIDE], Lanes (&y)[2]) {
    if constexpr (SIDE == 4)
        y[0] = (m[0] + m[1]) + m[2], y[1] = (m[1] - m[2]) - m[3];
    else
        y[0] = m[0] + m[1], y[1] = m[1] - m[2];
}

// B^T d B of a tile of inputs d, for CHUNK channels; `pixels` are those of the tile, row by row.
template <int SIDE>
void transform_tile(const float* const (&pixels)[SIDE * SIDE], int64_t channel, float* to, int64_t stride) {
    constexpr int VECTORS = CHUNK / LANES;
    for (int v = 0; v < VECTORS; ++v) {
        Lanes half[SIDE][SIDE];
        for (int j = 0; j < SIDE; ++j) {
            Lanes d[SIDE], t[SIDE];
            for (int i = 0; i < SIDE; ++i) d[i] = load(pixels[i * SIDE + j] + channel + v * LANES);
            transform_inputs(d, t);
            for (int i = 0; i < SIDE; ++i) half[i][j] = t[i];
        }
        for (int i = 0; i < SIDE; ++i) {
            Lanes t[SIDE];
            transform_inputs(half[i], t);
            for (int j = 0; j < SIDE; ++j) store(t[j], to + (i * SIDE + j) * stride + v * LANES);
        }
    }
}

// A^T m A of the products of a tile, for COLUMNS channels: 2 x 2 outputs.
template <int SIDE>
void transform_output(const float* m, int64_t stride, float (&out)[2][2][COLUMNS]) {
    for (int v = 0; v < 2; ++v) {
        Lanes half[2][SIDE];
        for (int j = 0; j < SIDE; ++j) {
            Lanes p[SIDE], y[2];
            for (int i = 0; i < SIDE; ++i) p[i] = load(m + (i * SIDE + j) * stride + v * LANES);
            transform_products(p, y);
            half[0][j] = y[0], half[1][j] = y[1];
        }
        for (int i = 0; i < 2; ++i) {
            Lanes y[2];
            transform_products(half[i], y);
            store(y[0], out[i][0] + v * LANES);
            store(y[1], out[i][1] + v * LANES);
        }
    }
}

// Args: SIDE: of a tile, in pixels of x: 4, or 3 if x is doubled in size first.
template <int SIDE>
void convolve_winograd(const Convolution<float>& conv, const Call& call) {
    constexpr int POSITIONS = SIDE * SIDE, STEP = SIDE - 2;  // the latter: from one tile to the next, in pixels
    int64_t across = blocks_of(conv.width, STEP), down = blocks_of(conv.height, STEP), total = conv.n * down * across;
    int64_t channels = conv.channels[0], chunks = blocks_of(channels, CHUNK), depth = chunks * CHUNK;
    // floats of a row's inputs; half of them and of a panel's products, so that all of them fit the whole cache
    int64_t length = POSITIONS * depth, near = (length + POSITIONS * COLUMNS) / 2;
    Division division(total, length, near, conv.panels(), length * COLUMNS, call.threads);
    int64_t rows = division.rows | 1, position = chunks * rows * CHUNK;  // stride from one position to the next
    // A group is as many panels as have products that fit half of the cache. All of a group are multiplied at a
    // position before the next one, so that the position's inputs stay in a cache.
    int64_t group = smaller(division.panels, larger(half_of_cache() / (POSITIONS * rows * COLUMNS), int64_t(1)));
    int64_t products = group * rows * COLUMNS;  // stride from one position to the next, of the products
    float* v = scratch.floats(POSITIONS * (position + products) + depth);
    float *m = v + POSITIONS * position, *zeros = m + POSITIONS * products;
    std::memset(zeros, 0, sizeof(float) * depth);
    auto weights = [&](int64_t panel, int p) { return conv.weights + (panel * POSITIONS + p) * depth * COLUMNS; };
    division.each(total, conv.panels(), call, [&](int64_t first, int count, int64_t panel, int64_t last) {
        Place tile(first, down, across);
        for (int i = 0; i < count; ++i, tile.next()) {
            const float* pixels[POSITIONS];
            for (int p = 0; p < POSITIONS; ++p) {
                int64_t y = tile.row * STEP - 1 + p / SIDE, x = tile.column * STEP - 1 + p % SIDE;
                bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
                int64_t pixel = (tile.entry * conv.height + y) * conv.width + x;
                pixels[p] = inside ? conv.inputs[0] + pixel * channels : zeros;
            }
            int64_t whole = channels / CHUNK;
            for (int64_t chunk = 0; chunk < whole; ++chunk)
                transform_tile<SIDE>(pixels, chunk * CHUNK, v + (chunk * rows + i) * CHUNK, position);
            if (whole == chunks) continue;
            float padded[POSITIONS][CHUNK] = {};
            for (int p = 0; p < POSITIONS; ++p) {
                std::memcpy(padded[p], pixels[p] + whole * CHUNK, sizeof(float) * (channels % CHUNK));
                pixels[p] = padded[p];
            }
            transform_tile<SIDE>(pixels, 0, v + (whole * rows + i) * CHUNK, position);
        }
        for (int64_t begin = panel; begin < last; begin += group) {
            int64_t end = smaller(begin + group, last);
            for (int p = 0; p < POSITIONS; ++p)
                for (int64_t of = begin; of < end; ++of) {
                    bool ends = of + 1 == end, is_last = ends && p + 1 == POSITIONS;
                    auto following = is_last ? weights(end, 0) : ends ? weights(begin, p + 1) : weights(of + 1, p);
                    multiply<float>(count, v + p * position, chunks, rows, weights(of, p), following,
                                    m + p * products + (of - begin) * rows * COLUMNS);
                }
            Place outputs(first, down, across);
            for (int i = 0; i < count; ++i, outputs.next()) {
                int64_t top = outputs.row * 2, left = outputs.column * 2;
                for (int64_t of = begin; of < end; ++of) {
                    float out[2][2][COLUMNS];
                    transform_output<SIDE>(m + ((of - begin) * rows + i) * COLUMNS, products, out);
                    for (int64_t y = 0; y < smaller<int64_t>(2, conv.out_height - top); ++y)
                        for (int64_t x = 0; x < smaller<int64_t>(2, conv.out_width - left); ++x)
                            conv.store(outputs.entry, top + y, left + x, of, out[y][x]);
                }
            }
        }
    });
}

// G g G^T of a 3 x 3 kernel g, whose elements are `stride` apart: computed in float64, rounded once.
void transform_kernel(const float* g, int64_t stride, float* to) {
    constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    double half[4][3];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 3; ++j) {
            half[i][j] = 0;
            for (int k = 0; k < 3; ++k) half[i][j] += G[i][k] * double(g[(3 * k + j) * stride]);
        }
    for (int p = 0; p < 16; ++p) {
        double sum = 0;
        for (int k = 0; k < 3; ++k) sum += half[p / 4][k] * G[p % 4][k];
        to[p] = float(sum);
    }
}

// The transform, 3 x 3, of a 3 x 3 kernel that follows a doubling: its first row, the sum of its rows and its last row;
// likewise columns. In float64, from the 2 x 2 kernels of the four phases, which are `phase` elements apart.
void transform_phases(const float* g, int64_t stride, int64_t phase, float* to) {
    for (int p = 0; p < 9; ++p) {
        int i = p / 3, j = p % 3;
        const float* kernel = g + (i / 2 * 2 + j / 2) * phase;
        double sum = 0;
        for (int row = i / 2; row <= (i + 1) / 2; ++row)
            for (int column = j / 2; column <= (j + 1) / 2; ++column)
                sum += double(kernel[(row * 2 + column) * stride]);
        to[p] = float(sum);
    }
}

}  // namespace

void convolution(const Call& call) {
    Arguments a(call);
    int64_t dtype = a.size(), winograd = a.size();
    if (dtype == FLOAT32) {
        const Convolution<float> conv(a);
        auto run = !winograd                 ? convolve_gathered<float>
                   : conv.kernel_height == 3 ? convolve_winograd<4>
                                             : convolve_winograd<3>;
        run(conv, call);
    }
    if constexpr (MULTIPLIES<BFloat16>)
        if (dtype == BFLOAT16) convolve_gathered(Convolution<BFloat16>(a), call);
}

namespace {

template <class T>
void pack_panels(Arguments& a, const Call& call, bool winograd) {
    int64_t out_channels = a.size(), channels = a.size(), height = a.size(), width = a.size();
    auto packed = a.pointer<float>();  // [panels, positions (16, 9 or 1), words padded to CHUNK, COLUMNS]
    auto weights = a.pointer<const T>();  // [out_channels, height, width, channels], or [4, ...] for phases
    int64_t depth = winograd ? channels : height * width * channels;
    assert(!winograd || (height == width && (width == 2 || width == 3)));
    int64_t padded = blocks_of(depth, CHUNK * PER_WORD<T>) * CHUNK;
    int64_t positions = winograd ? (width + 1) * (width + 1) : 1;
    Share share(blocks_of(out_channels, COLUMNS), call);
    for (int64_t panel = share.first; panel < share.last; ++panel) {
        float* to = packed + panel * positions * padded * COLUMNS;
        std::memset(to, 0, sizeof(float) * positions * padded * COLUMNS);
        int64_t count = smaller<int64_t>(COLUMNS, out_channels - panel * COLUMNS);
        for (int64_t c = 0; c < count; ++c) {
            const T* from = weights + (panel * COLUMNS + c) * height * width * channels;
            for (int64_t k = 0; k < depth; ++k) {
                if constexpr (PER_WORD<T> == 1) {
                    float transformed[16] = {from[k]};
                    if (winograd && width == 3)
                        transform_kernel(from + k, channels, transformed);
                    else if (winograd)
                        transform_phases(from + k, channels, out_channels * 4 * channels, transformed);
                    for (int64_t p = 0; p < positions; ++p) to[(p * padded + k) * COLUMNS + c] = transformed[p];
                } else {
                    auto words = reinterpret_cast<T*>(to + k / PER_WORD<T> * COLUMNS + c);
                    words[k % PER_WORD<T>] = from[k];
                }
            }
        }
    }
}

}  // namespace

// Pack the weights of a convolution into panels of COLUMNS output channels, for gathered inputs or for Winograd's
// method, which takes kernels of 3 x 3, or the four 2 x 2 kernels of an upsampling's phases.
void pack(const Call& call) {
    Arguments a(call);
    int64_t dtype = a.size(), winograd = a.size();
    dtype == FLOAT32 ? pack_panels<float>(a, call, winograd) : pack_panels<BFloat16>(a, call, winograd);
}

}  // namespace fastddpm::FASTDDPM_ISA
