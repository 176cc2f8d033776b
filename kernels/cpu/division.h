// How the rows and the columns of a convolution's matrix product are divided among threads, and what they take at once.
#pragma once

#include "gemm.h"
#include "scratch.h"

namespace fastddpm::FASTDDPM_ISA {

inline int64_t half_of_cache() { return second_level_cache() / 2 / int64_t(sizeof(float)); }  // in floats

// How the rows of the matrix (outputs or tiles) and its columns (panels of channels) are divided into units of work.
//
// The inputs of the rows of a unit are gathered or transformed into scratch memory. They fit the second-level cache,
// unless few rows do: then more may share a unit, and read their inputs from beyond it, rather than read all weights
// again. The weights of its panels are read from beyond that cache. So threads with the same rows repeat the former
// work, and threads with the same panels repeat the latter.
struct Division {
    int64_t rows = 0, row_blocks = 0, panels = 0, panel_blocks = 0;

    // Args: depth: floats of a row's inputs; near: those of a row that are to fit half of the cache; weights: those of
    //     a panel.
    Division(int64_t total, int64_t depth, int64_t near, int64_t all_panels, int64_t weights, int64_t threads) {
        if (total == 0) return;
        constexpr double GATHER = 0.4, READ = 1.0, READ_FROM_CACHE = 0.2, FAR = 0.5;  // cycles per float
        int64_t cached = half_of_cache(), fit = larger(cached / near, int64_t(ROWS));
        int64_t largest = smaller(total, fit < 2 * ROWS ? 8 * fit : fit);
        double read = all_panels * weights > cached ? READ : READ_FROM_CACHE, least = 0;
        for (int64_t most = smaller(total, fit);; most = smaller(2 * most, largest)) {
            for (int64_t parts = 1; parts <= smaller(threads, all_panels); ++parts) {
                int64_t sharing = blocks_of(threads, parts);  // threads among which the rows are divided
                int64_t blocks = blocks_of(blocks_of(total, most), sharing) * sharing, count = blocks_of(total, blocks);
                int64_t of_part = blocks_of(all_panels, parts), each = blocks_of(blocks * parts, threads);
                double times = double(of_part) * (count > fit ? 1 + FAR : 1);
                double unit = double(count) * depth * (GATHER + times) + double(of_part) * weights * read;
                if (rows && each * unit >= least) continue;
                least = each * unit;
                rows = count, row_blocks = blocks_of(total, count);
                panels = of_part, panel_blocks = blocks_of(all_panels, of_part);
            }
            if (most == largest) break;
        }
    }

    template <class Function>
    void each(int64_t total, int64_t all_panels, const Call& call, Function function) const {
        Share share(row_blocks * panel_blocks, call);
        for (int64_t unit = share.first; unit < share.last; ++unit) {
            int64_t row = unit % row_blocks * rows, panel = unit / row_blocks * panels;
            function(row, int(smaller(rows, total - row)), panel, smaller(panel + panels, all_panels));
        }
    }
};

}  // namespace fastddpm::FASTDDPM_ISA
