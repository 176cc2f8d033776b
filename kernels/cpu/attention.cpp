// Self-attention softmax(Q K^T / sqrt(d)) V of each head, in fp32: reads queries, keys and values, writes y.
//
// Traffic: each input is read once, keys and values once more for each block of queries.
// Precision: fp32, products fused with sums where the CPU can, in an order that depends on neither batch nor threads.
// Spec: scaled_dot_product_attention of torch. Proof: tests/kernels/cpu/test_program.py (float64).
#include "exponential.h"
#include "gemm.h"
#include "scratch.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int QUERIES = 4 * ROWS;  // of a unit of work
constexpr int STRIDE = QUERIES | 1;  // between chunks, in rows: odd, to use all sets of the cache
constexpr int KEYS = 32;           // likewise: a multiple of CHUNK and of COLUMNS

struct Attention {
    int64_t n, tokens, heads, dim;
    float* y;          // [n, tokens, heads, dim]
    const float* qkv;  // [n, tokens, 3, heads, dim]
    float* packed;     // [n, heads, 2, size()], scratch: panels of K^T and of V

    explicit Attention(Arguments& a)
        : n(a.size()), tokens(a.size()), heads(a.size()), dim(a.size()), y(a.pointer<float>()),
          qkv(a.pointer<const float>()), packed(a.pointer<float>()) {}

    int64_t depth() const { return blocks_of(dim, CHUNK) * CHUNK; }
    int64_t keys() const { return blocks_of(tokens, KEYS) * KEYS; }
    int64_t values() const { return blocks_of(dim, COLUMNS) * COLUMNS; }
    int64_t size() const { return keys() * (depth() > values() ? depth() : values()); }
    float* panels(int64_t entry, int64_t head, int which) const {
        return packed + ((entry * heads + head) * 2 + which) * size();
    }
    // Queries, keys or values (0, 1, 2) of a token.
    const float* row(int64_t entry, int64_t head, int64_t token, int which) const {
        return qkv + (((entry * tokens + token) * 3 + which) * heads + head) * dim;
    }
};

// K^T as panels of COLUMNS tokens [depth, COLUMNS], and V as panels of COLUMNS elements [keys, COLUMNS]: of the KEYS
// tokens from `first` on.
void pack_tokens(const Attention& attention, int64_t entry, int64_t head, int64_t first) {
    float *keys = attention.panels(entry, head, 0), *values = attention.panels(entry, head, 1);
    int64_t depth = attention.depth(), rows = attention.keys(), dim = attention.dim;
    for (int64_t token = first; token < first + KEYS; ++token) {
        bool exists = token < attention.tokens;
        const float *k = attention.row(entry, head, token, 1), *v = attention.row(entry, head, token, 2);
        float* column = keys + token / COLUMNS * depth * COLUMNS + token % COLUMNS;
        for (int64_t i = 0; i < depth; ++i) column[i * COLUMNS] = exists && i < dim ? k[i] : 0.0f;
        for (int64_t i = 0; i < attention.values(); i += COLUMNS) {
            float* to = values + (i / COLUMNS * rows + token) * COLUMNS;
            for (int64_t j = 0; j < COLUMNS; ++j) to[j] = exists && i + j < dim ? v[i + j] : 0.0f;
        }
    }
}

// The sums of exp(s - max s) of `count` rows of scores, which they replace; those beyond the tokens become 0.
void exponentials(float* scores, int count, int64_t tokens, int64_t keys, float* sums) {
    for (int row = 0; row < count; ++row) {
        float* s = scores + row * CHUNK;
        float most[CHUNK], sum[CHUNK] = {};
        std::memcpy(most, s, sizeof most);
        for (int64_t token = CHUNK; token < tokens; token += CHUNK)
            for (int i = 0; i < CHUNK; ++i) {
                float score = s[token / CHUNK * STRIDE * CHUNK + i];
                most[i] = token + i < tokens && score > most[i] ? score : most[i];
            }
        float max = most[0];
        for (int i = 1; i < CHUNK; ++i) max = i < tokens && most[i] > max ? most[i] : max;
        for (int64_t token = 0; token < keys; token += CHUNK)
            for (int i = 0; i < CHUNK; ++i) {
                float& score = s[token / CHUNK * STRIDE * CHUNK + i];
                float value = Exponential(score - max).value();
                score = token + i < tokens ? value : 0.0f;
                sum[i] += score;
            }
        sums[row] = 0;
        for (int i = 0; i < CHUNK; ++i) sums[row] += sum[i];
    }
}

void attend(const Attention& attention, int64_t entry, int64_t head, int64_t first) {
    int count = int(smaller<int64_t>(QUERIES, attention.tokens - first));
    int64_t depth = attention.depth(), keys = attention.keys();
    float* queries = scratch.floats(STRIDE * (depth + keys + COLUMNS));
    float *scores = queries + STRIDE * depth, *c = scores + STRIDE * keys, sums[QUERIES];
    float scale = 1 / __builtin_sqrtf(float(attention.dim));
    for (int row = 0; row < count; ++row) {
        const float* q = attention.row(entry, head, first + row, 0);
        for (int64_t i = 0; i < depth; ++i)
            queries[i / CHUNK * STRIDE * CHUNK + row * CHUNK + i % CHUNK] = i < attention.dim ? q[i] : 0.0f;
    }
    for (int64_t key = 0; key < keys; key += COLUMNS) {
        multiply(count, queries, depth / CHUNK, STRIDE, attention.panels(entry, head, 0) + key * depth, c);
        for (int row = 0; row < count; ++row)
            for (int64_t i = 0; i < COLUMNS; ++i)
                scores[(key + i) / CHUNK * STRIDE * CHUNK + row * CHUNK + (key + i) % CHUNK] =
                    c[row * COLUMNS + i] * scale;
    }
    exponentials(scores, count, attention.tokens, keys, sums);
    for (int64_t part = 0; part < attention.dim; part += COLUMNS) {
        multiply(count, scores, keys / CHUNK, STRIDE, attention.panels(entry, head, 1) + part * keys, c);
        for (int row = 0; row < count; ++row) {
            float* y =
                attention.y + ((entry * attention.tokens + first + row) * attention.heads + head) * attention.dim;
            for (int64_t i = 0; i < smaller<int64_t>(COLUMNS, attention.dim - part); ++i)
                y[part + i] = c[row * COLUMNS + i] / sums[row];
        }
    }
}

}  // namespace

void attention(const Call& call) {
    Arguments a(call);
    const Attention attention(a);
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

}  // namespace fastddpm::FASTDDPM_ISA
