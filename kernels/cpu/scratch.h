// Memory of one thread, kept for its next call, and the size of its cache.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

class Scratch {
  public:
    float* floats(int64_t count) {
#ifdef __SANITIZE_ADDRESS__
        bool fits = count == count_;  // so that it sees what is beyond the memory of this call
#else
        bool fits = count <= count_;
#endif
        if (!fits) {
            std::free(memory_);
            memory_ = static_cast<float*>(std::aligned_alloc(64, size_t(count * 4 + 63) / 64 * 64));
            if (!memory_) {  // exceptions are disabled
                std::fprintf(stderr, "fastddpm: no memory is left for a kernel on the CPU\n");
                std::abort();
            }
            count_ = count;
        }
        return memory_;
    }
    ~Scratch() { std::free(memory_); }

  private:
    float* memory_ = nullptr;
    int64_t count_ = 0;
};

static thread_local Scratch scratch;

// The size of a core's second-level cache in bytes, between 256 kB and 2 MB. It is not a constant of the file: that
// would be computed when the module is loaded, perhaps by instructions that this CPU does not have.
inline int64_t second_level_cache() {
    static const int64_t size = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
        int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
        int64_t found = 0;
#endif
        return found < 1 << 18 ? int64_t(1) << 18 : smaller<int64_t>(found, 1 << 21);
    }();
    return size;
}

}  // namespace fastddpm::FASTDDPM_ISA
