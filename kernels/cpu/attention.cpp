// Self-attention softmax(Q K^T / sqrt(d)) V of each head: reads queries, keys and values, writes y.
//
// Traffic: each input is read once, keys and values once more for each block of queries.
// Precision: scores, exponentials and sums in fp32; in bf16 the products are those of bf16 numbers. The order of all sums
// depends on neither batch nor threads.
// Spec: scaled_dot_product_attention of torch. Proof: tests/kernels/cpu/test_program.py (float64).
#include "exponential.h"
#include "gemm.h"
#include "scratch.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int QUERIES = 48;  // of a unit of work
constexpr int STRIDE = QUERIES | 1;  // between chunks, in rows: odd, to use all sets of the cache
constexpr int KEYS = 32;  // likewise: a multiple of a chunk of any type, and of COLUMNS

template <class T>
struct Attention {
    static constexpr int64_t LENGTH = CHUNK * PER_WORD<T>;  // of a chunk, in elements

    int64_t n, tokens, heads, dim;
    T* y;  // [n, tokens, heads, dim]
    const T* qkv;  // [n, tokens, 3, heads, dim]
    float* packed;  // [n, heads, 2, size()], scratch: panels of K^T and of V

    explicit Attention(Arguments& a)
        : n(a.size()), tokens(a.size()), heads(a.size()), dim(a.size()), y(a.pointer<T>()), qkv(a.pointer<const T>()),
          packed(a.pointer<float>()) {}

    int64_t depth() const { return blocks_of(dim, LENGTH) * CHUNK; }  // in words
    int64_t keys() const { return blocks_of(tokens, KEYS) * KEYS; }
    int64_t values() const { return blocks_of(dim, COLUMNS) * COLUMNS; }
    int64_t size() const { return keys() * (depth() > values() ? depth() : values()); }
    float* panels(int64_t entry, int64_t head, int which) const {
        return packed + ((entry * heads + head) * 2 + which) * size();
    }
    // Queries, keys or values (0, 1, 2) of a token.
    const T* row(int64_t entry, int64_t head, int64_t token, int which) const {
        return qkv + (((entry * tokens + token) * 3 + which) * heads + head) * dim;
    }
};

// Element k of a column of a panel.
template <class T>
T& element(float* panel, int64_t k, int64_t column) {
    return reinterpret_cast<T*>(panel + k / PER_WORD<T> * COLUMNS + column)[k % PER_WORD<T>];
}

// K^T as panels of COLUMNS tokens [depth, COLUMNS], and V as panels of COLUMNS elements [keys, COLUMNS]: of the KEYS
// tokens from `first` on.
template <class T>
void pack_tokens(const Attention<T>& attention, int64_t entry, int64_t head, int64_t first) {
    float *keys = attention.panels(entry, head, 0), *values = attention.panels(entry, head, 1);
    int64_t depth = attention.depth(), rows = attention.keys() / PER_WORD<T>, dim = attention.dim;
    for (int64_t token = first; token < first + KEYS; ++token) {
        bool exists = token < attention.tokens;
        const T *k = attention.row(entry, head, token, 1), *v = attention.row(entry, head, token, 2);
        float* panel = keys + token / COLUMNS * depth * COLUMNS;
        for (int64_t i = 0; i < depth * PER_WORD<T>; ++i)
            element<T>(panel, i, token % COLUMNS) = exists && i < dim ? k[i] : T{};
        for (int64_t i = 0; i < attention.values(); ++i)
            element<T>(values + i / COLUMNS * rows * COLUMNS, token, i % COLUMNS) = exists && i < dim ? v[i] : T{};
    }
}

// Write exp(s - max s) of a row of scores into the chunks of a matrix. Returns: their sum before they are rounded.
template <class T>
float exponentials(const float* scores, int64_t tokens, int64_t keys, float* to) {
    float most[CHUNK], sum[CHUNK] = {};
    std::memcpy(most, scores, sizeof most);
    for (int64_t token = CHUNK; token < keys; token += CHUNK)
        for (int i = 0; i < CHUNK; ++i) {
            float score = scores[token + i];
            most[i] = token + i < tokens && score > most[i] ? score : most[i];
        }
    float max = most[0];
    for (int i = 1; i < CHUNK; ++i) max = i < tokens && most[i] > max ? most[i] : max;
    for (int64_t token = 0; token < keys; token += CHUNK) {
        constexpr int64_t LENGTH = Attention<T>::LENGTH;
        T* chunk = reinterpret_cast<T*>(to + token / LENGTH * STRIDE * CHUNK) + token % LENGTH;
        for (int i = 0; i < CHUNK; ++i) {
            float value = Exponential(scores[token + i] - max).value();
            value = token + i < tokens ? value : 0.0f;
            sum[i] += value;
            narrow(value, chunk[i]);
        }
    }
    float total = 0;
    for (int i = 0; i < CHUNK; ++i) total += sum[i];
    return total;
}

template <class T>
void attend(const Attention<T>& attention, int64_t entry, int64_t head, int64_t first) {
    int count = int(smaller<int64_t>(QUERIES, attention.tokens - first));
    int64_t depth = attention.depth(), keys = attention.keys(), words = keys / PER_WORD<T>, dim = attention.dim;
    float* queries = scratch.floats((STRIDE + SLACK) * (depth + words + COLUMNS) + QUERIES * keys);
    float *weights = queries + (STRIDE + SLACK) * depth, *c = weights + (STRIDE + SLACK) * words;
    float *scores = c + (STRIDE + SLACK) * COLUMNS, sums[QUERIES];
    float scale = 1 / __builtin_sqrtf(float(dim));
    constexpr int64_t LENGTH = Attention<T>::LENGTH;
    for (int row = 0; row < count; ++row) {
        const T* q = attention.row(entry, head, first + row, 0);
        for (int64_t i = 0; i < depth * PER_WORD<T>; ++i) {
            T* chunk = reinterpret_cast<T*>(queries + (i / LENGTH * STRIDE + row) * CHUNK);
            chunk[i % LENGTH] = i < dim ? q[i] : T{};
        }
    }
    for (int64_t key = 0; key < keys; key += COLUMNS) {
        const float* panel = attention.panels(entry, head, 0) + key * depth;
        multiply<T>(count, queries, depth / CHUNK, STRIDE, panel, panel + depth * COLUMNS, c);
        for (int row = 0; row < count; ++row)
            for (int i = 0; i < COLUMNS; ++i) scores[row * keys + key + i] = c[row * COLUMNS + i] * scale;
    }
    for (int row = 0; row < count; ++row)
        sums[row] = exponentials<T>(scores + row * keys, attention.tokens, keys, weights + row * CHUNK);
    for (int64_t part = 0; part < dim; part += COLUMNS) {
        const float* panel = attention.panels(entry, head, 1) + part * words;
        multiply<T>(count, weights, words / CHUNK, STRIDE, panel, panel + words * COLUMNS, c);
        for (int row = 0; row < count; ++row) {
            T* y = attention.y + ((entry * attention.tokens + first + row) * attention.heads + head) * dim + part;
            for (int64_t i = 0; i < smaller<int64_t>(COLUMNS, dim - part); ++i)
                narrow(c[row * COLUMNS + i] / sums[row], y[i]);
        }
    }
}

template <class T>
void run(const Attention<T>& attention, const Call& call) {
    [[maybe_unused]] Tiles tiles;
    int64_t blocks = call.phase == 0 ? attention.keys() / KEYS : blocks_of(attention.tokens, QUERIES);
    Share share(attention.n * attention.heads * blocks, call);
    for (int64_t unit = share.first; unit < share.last; ++unit) {
        int64_t head = unit / blocks % attention.heads, entry = unit / blocks / attention.heads;
        if (call.phase == 0)
            pack_tokens(attention, entry, head, unit % blocks * KEYS);
        else
            attend(attention, entry, head, unit % blocks * QUERIES);
    }
}

}  // namespace

void attention(const Call& call) {
    Arguments a(call);
    int64_t dtype = a.size();
    if (dtype == FLOAT32) run(Attention<float>(a), call);
    if constexpr (MULTIPLIES<BFloat16>)
        if (dtype == BFLOAT16) run(Attention<BFloat16>(a), call);
}

}  // namespace fastddpm::FASTDDPM_ISA
