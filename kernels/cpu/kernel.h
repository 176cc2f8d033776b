// What all kernels have in common. Each is compiled once for every instruction set, in a namespace of its own.
//
// A kernel is a function of a Call: its arguments as 64-bit words, and which share of the work to do. Every thread of a
// call runs the same function. Kernels with several phases are called once for each; all threads finish a phase before
// any of them begins the next. The compiler reorders no sums and, outside attention.cpp and convolution.cpp, fuses
// no products with sums. So there a kernel that computes each element on its own has the same bits on every instruction
// set and with any number of threads.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastddpm {

struct Call {
    const int64_t* words;
    int phase, thread, threads;
};

}  // namespace fastddpm

namespace fastddpm::FASTDDPM_ISA {

// The words of a call, one after the other: pointers, sizes, and the bits of doubles.
class Arguments {
  public:
    explicit Arguments(const Call& call) : word_(call.words) {}
    template <class T>
    T* pointer() {
        return reinterpret_cast<T*>(*word_++);
    }
    int64_t size() {
        assert(*word_ >= 0);
        return *word_++;
    }
    double real() {
        double value;
        std::memcpy(&value, word_++, sizeof value);
        return value;
    }

  private:
    const int64_t* word_;
};

// The part [first, last) of `total` units of work that a thread does.
struct Share {
    int64_t first, last;
    Share(int64_t total, const Call& call)
        : first(begin(total, call.thread, call.threads)), last(begin(total, call.thread + 1, call.threads)) {}

  private:
    static int64_t begin(int64_t total, int64_t thread, int64_t threads) {
        return total / threads * thread + total % threads * thread / threads;
    }
};

// Floats of a vector register, and their bits.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t SignedBits __attribute__((vector_size(4 * LANES)));

// Lanes at any address. memcpy would move them in halves, and whoever reads the whole must wait for both.
typedef float LanesInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
inline Lanes load(const float* from) { return *reinterpret_cast<const LanesInMemory*>(from); }
inline void store(Lanes value, float* to) { *reinterpret_cast<LanesInMemory*>(to) = value; }

template <class T>
T smaller(T a, T b) {
    return b < a ? b : a;
}

template <class T>
T larger(T a, T b) {
    return b < a ? a : b;
}

inline int64_t blocks_of(int64_t elements, int64_t block) { return (elements + block - 1) / block; }

template <class To, class From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

}  // namespace fastddpm::FASTDDPM_ISA
