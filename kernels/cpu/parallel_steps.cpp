// The operations of a round of sampling parallel in time, each of which loops over the rows of a chain.
//
// Traffic and precision: as kernels/draft.py, kernels/first_difference.py and kernels/commit.py, their twins.
// Spec: fastddpm/reference/parallel.py with fastddpm/core/noise.py, stream 0.
// Proof: tests/ops/test_parallel_steps.py (bits).
#include "floats.h"
#include "step.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// What all three operations read. `slot` is where a row of a chain lies in [G * W, per_sample].
struct Chains {
    int64_t count, per_sample, window;
    const Row* rows;           // [S]
    const int32_t* timesteps;  // [S]
    const int32_t* positions;  // [G]; -1: the chain is finished
    const Address* addresses;  // [G]
    bool clip;

    explicit Chains(Arguments& a)
        : count(a.size()), per_sample(a.size()), window(a.size()), rows(a.pointer<const Row>()),
          timesteps(a.pointer<const int32_t>()), positions(a.pointer<const int32_t>()),
          addresses(a.pointer<const Address>()), clip(a.size()) {}

    int64_t slot(int64_t chain, int64_t row, int64_t block) const {
        return (chain * window + row % window) * per_sample + block * BLOCK;
    }

    // Replace x by the state after its step at a row.
    void step(int64_t chain, int64_t row, int64_t block, int count, const float* m, float* x) const {
        float next[BLOCK];
        reverse_step(rows[row], clip, addresses[chain], timesteps[row], block, count, x, m, next);
        std::memcpy(x, next, sizeof(float) * count);
    }
};

bool is_finite(float x) { return (bits_as<uint32_t>(x) & 0x7F800000) != 0x7F800000; }

void predict_x_0(const Row& row, float scale, int count, const float* x, const float* m, float* x_0) {
    for (int i = 0; i < count; ++i) {
        float clean = row.cx * x[i] + row.cm * m[i];
        clean = clean < row.lo ? row.lo : clean;  // NaN stays NaN
        clean = clean > row.hi ? row.hi : clean;
        x_0[i] = scale * clean;
    }
}

void round_to_bfloat16(int count, const float* x, float* rounded) {
    for (int i = 0; i < count; ++i) {
        BFloat16 narrowed;
        narrow(x[i], narrowed);
        rounded[i] = widen(narrowed);
    }
}

}  // namespace

void draft(const Call& call) {
    Arguments a(call);
    Chains chains(a);
    auto states = a.pointer<float>();         // [G * W, per_sample], updated in place
    auto copy = a.pointer<char>();            // like states in copy_dtype, or null
    auto x = a.pointer<const float>();        // [G, per_sample]
    auto m = a.pointer<const float>();        // like states
    auto scale = a.pointer<const float>();    // [S]
    auto seen = a.pointer<const int32_t>();   // [G]: the lowest row of the last round
    int64_t ahead = a.size(), last_row = a.size(), copy_dtype = a.size(), rounded = a.size();

    each_block(chains.count, chains.per_sample, call, [&](int64_t chain, int64_t block, int64_t at, int count) {
        int64_t pos = chains.positions[chain], lowest = seen[chain];
        float state[BLOCK], input[BLOCK], guess[BLOCK], kept[BLOCK], x_0[BLOCK] = {};
        if (pos + 1 >= lowest) {
            int64_t row = smaller(pos + 1, last_row), place = chains.slot(chain, row, block);
            predict_x_0(chains.rows[row], scale[row], count, states + place, m + place, x_0);
        }
        std::memcpy(state, x + at, sizeof(float) * count);
        for (int64_t i = 0; i < ahead && i <= pos; ++i) {
            int64_t row = pos - i, place = chains.slot(chain, row, block);
            const Row& c = chains.rows[row];
            bool was_seen = row >= lowest;
            if (was_seen) {
                const float *old = states + place, *output = m + place;
                float ratio = c.cx / c.cm, predicted[BLOCK];
                predict_x_0(c, scale[row], count, old, output, predicted);
                for (int k = 0; k < count; ++k) kept[k] = output[k] + ratio * (old[k] - state[k]);
                for (int k = 0; k < count; ++k) x_0[k] = is_finite(kept[k]) ? predicted[k] : x_0[k];
            }
            for (int k = 0; k < count; ++k) guess[k] = (x_0[k] / scale[row] - c.cx * state[k]) / c.cm;
            if (was_seen)  // a network may overflow on a poor draft
                for (int k = 0; k < count; ++k) guess[k] = is_finite(kept[k]) ? kept[k] : guess[k];
            std::memcpy(states + place, state, sizeof(float) * count);
            if (copy) {
                if (rounded)
                    round_to_bfloat16(count, state, input);
                else
                    std::memcpy(input, state, sizeof(float) * count);
                with_float(copy_dtype, [&](auto* type) {
                    auto to = reinterpret_cast<decltype(type)>(copy) + place;
                    for (int k = 0; k < count; ++k) narrow(input[k], to[k]);
                });
            }
            chains.step(chain, row, block, count, guess, state);
        }
    });
}

void first_difference(const Call& call) {
    Arguments a(call);
    Chains chains(a);
    auto reached = a.pointer<int32_t>();      // [G]: raised to the highest row that differs
    auto x = a.pointer<const float>();        // [G, per_sample]
    auto states = a.pointer<const float>();   // [G * W, per_sample]: the drafts
    auto m = a.pointer<const float>();        // like states: the network's outputs for them
    int64_t ahead = a.size();

    each_block(chains.count, chains.per_sample, call, [&](int64_t chain, int64_t block, int64_t at, int count) {
        int64_t pos = chains.positions[chain];
        float state[BLOCK], input[BLOCK], draft[BLOCK];
        std::memcpy(state, x + at, sizeof(float) * count);
        for (int64_t i = 0; i < ahead && i <= pos; ++i) {
            int64_t row = pos - i, place = chains.slot(chain, row, block);
            round_to_bfloat16(count, state, input);
            round_to_bfloat16(count, states + place, draft);
            bool differs = i && std::memcmp(input, draft, sizeof(float) * count) != 0;
            if (differs) return raise_to(reached + chain, int32_t(row));
            chains.step(chain, row, block, count, m + place, state);
        }
    });
}

void commit(const Call& call) {
    Arguments a(call);
    Chains chains(a);
    auto x = a.pointer<float>();              // [G, per_sample], updated in place
    auto m = a.pointer<const float>();        // [G * W, per_sample]
    auto reached = a.pointer<const int32_t>();  // [G]: the row that each chain goes to
    auto bad = a.pointer<int32_t>();          // [G], or null

    each_block(chains.count, chains.per_sample, call, [&](int64_t chain, int64_t block, int64_t at, int count) {
        for (int64_t row = chains.positions[chain]; row > reached[chain]; --row) {
            chains.step(chain, row, block, count, m + chains.slot(chain, row, block), x + at);
            if (bad && !all_finite(count, x + at)) raise_to(bad + chain, int32_t(row));
        }
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
