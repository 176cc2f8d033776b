// Self-attention softmax(Q K^T / sqrt(d)) V of each head: reads queries, keys and values, writes y.
//
// Traffic: each input is read once, keys and values once more for each block of queries.
// Precision: scores, exponentials and sums in fp32; in bf16 the products are those of bf16 numbers. The order of all
// sums depends on neither batch nor threads.
// Spec: scaled_dot_product_attention of torch. Proof: tests/kernels/cpu/test_program.py (float64).
#include "exponential.h"
#include "gemm.h"
#include "scratch.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int QUERIES = 48;  // of a unit of work, at most
constexpr int STRIDE = QUERIES | 1;  // between chunks, in rows: odd, to use all sets of the cache
constexpr int KEYS = 32;  // of a unit of work: a multiple of a chunk of any type, and of COLUMNS

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
        const T *k = attention.row(entry, head, token, 1), *v = attention.row(entry, head, token, 2);
        int64_t column = token % COLUMNS, count = token < attention.tokens ? dim : 0, i = 0;
        float* panel = keys + token / COLUMNS * depth * COLUMNS;
        for (; i < count; ++i) element<T>(panel, i, column) = k[i];
        for (; i < depth * PER_WORD<T>; ++i) element<T>(panel, i, column) = T{};
        for (int64_t part = 0; part < attention.values(); part += COLUMNS) {
            float* to = values + part * rows;
            int64_t exist = count - part;
            for (int c = 0; c < COLUMNS; ++c) element<T>(to, token, c) = c < exist ? v[part + c] : T{};
        }
    }
}

// Write exp(s - max s) of a row of scores into the chunks of a matrix. Returns: their sum before they are rounded.
template <class T>
float exponentials(const float* scores, int64_t tokens, int64_t keys, float* to) {
    constexpr int VECTORS = KEYS / LANES;
    constexpr int64_t LENGTH = Attention<T>::LENGTH;
    float order[LANES];
    for (int i = 0; i < LANES; ++i) order[i] = float(i);
    auto exist = [&](int64_t token) { return load(order) < float(tokens - token); };
    Lanes most = load(scores), sum[VECTORS] = {};
    for (int64_t token = LANES; token < keys; token += LANES) {
        Lanes score = load(scores + token);
        most = exist(token) & (score > most) ? score : most;
    }
    float max = most[0], total = 0;
    for (int i = 1; i < LANES; ++i) max = i < tokens && most[i] > max ? most[i] : max;
    for (int64_t token = 0; token < keys; token += KEYS) {
        Lanes values[VECTORS];
        for (int i = 0; i < VECTORS; ++i) values[i] = load(scores + token + i * LANES) - max;
        Exponentials<VECTORS> e(values);
        for (int i = 0; i < VECTORS; ++i) {
            int64_t at = token + i * LANES;
            Lanes value = exist(at) ? e.value(i) : Lanes{};
            sum[i] += value;
            store(value, reinterpret_cast<T*>(to + at / LENGTH * STRIDE * CHUNK) + at % LENGTH, LANES);
        }
    }
    for (int i = 0; i < KEYS; ++i) total += sum[i / LANES][i % LANES];
    return total;
}

template <class T>
void attend(const Attention<T>& attention, int64_t entry, int64_t head, int64_t first, int count) {
    int64_t depth = attention.depth(), keys = attention.keys(), words = keys / PER_WORD<T>, dim = attention.dim;
    float* queries = scratch.floats((STRIDE + SLACK) * (depth + words + COLUMNS) + QUERIES * keys);
    float *weights = queries + (STRIDE + SLACK) * depth, *c = weights + (STRIDE + SLACK) * words;
    float *scores = c + (STRIDE + SLACK) * COLUMNS, sums[QUERIES];
    float scale = 1 / __builtin_sqrtf(float(dim));
    constexpr int64_t LENGTH = Attention<T>::LENGTH;
    for (int row = 0; row < count; ++row) {
        const T* q = attention.row(entry, head, first + row, 0);
        for (int64_t i = 0; i < dim; i += LENGTH) {
            T* chunk = reinterpret_cast<T*>(queries + (i / LENGTH * STRIDE + row) * CHUNK);
            int64_t exist = dim - i;
            for (int j = 0; j < LENGTH; ++j) chunk[j] = j < exist ? q[i + j] : T{};
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

// Into how many blocks to divide the queries of each of so many pairs of an entry and a head. A thread's time is that
// of its queries, and for each block that of reading keys and values, about as long as ROWS queries take.
int64_t query_blocks(int64_t tokens, int64_t pairs, int64_t threads) {
    int64_t fewest = blocks_of(tokens, QUERIES), best = fewest, least = 0;
    for (int64_t blocks = fewest; blocks <= smaller(tokens, fewest + threads); ++blocks) {
        int64_t time = blocks_of(pairs * blocks, threads) * (blocks_of(tokens, blocks) + ROWS);
        if (blocks > fewest && time >= least) continue;
        best = blocks, least = time;
    }
    return best;
}

template <class T>
void run(const Attention<T>& attention, const Call& call) {
    [[maybe_unused]] Tiles tiles;
    int64_t pairs = attention.n * attention.heads, tokens = attention.tokens;
    int64_t blocks = call.phase == 0 ? attention.keys() / KEYS : query_blocks(tokens, pairs, call.threads);
    Share share(pairs * blocks, call);
    for (int64_t unit = share.first; unit < share.last; ++unit) {
        int64_t pair = unit / blocks, block = unit % blocks, head = pair % attention.heads;
        int64_t entry = pair / attention.heads, first = tokens * block / blocks;
        if (call.phase == 0)
            pack_tokens(attention, entry, head, block * KEYS);
        else
            attend(attention, entry, head, first, int(tokens * (block + 1) / blocks - first));
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
