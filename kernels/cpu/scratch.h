// Memory of one thread, kept for its next call.
#pragma once

#include <cstdlib>

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

class Scratch {
  public:
    float* floats(int64_t count) {
        if (count > count_) {
            std::free(memory_);
            memory_ = static_cast<float*>(std::aligned_alloc(64, size_t(count * 4 + 63) / 64 * 64));
            count_ = memory_ ? count : 0;
        }
        return memory_;
    }
    ~Scratch() { std::free(memory_); }

  private:
    float* memory_ = nullptr;
    int64_t count_ = 0;
};

static thread_local Scratch scratch;

}  // namespace fastddpm::FASTDDPM_ISA
