// Elements of tensors: float32, bfloat16, float16, uint8. They are widened to float and rounded to nearest even.
#pragma once

#include "kernel.h"

namespace fastddpm::FASTDDPM_ISA {

enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16, UINT8 };

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline float widen(Float16 x) {
    uint32_t magnitude = uint32_t(x.bits & 0x7FFF) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    // the exponent is too small by 112, which a product corrects, also for subnormal numbers; the largest is infinity
    float scaled = bits_as<float>(magnitude) * 0x1p112f;
    uint32_t top = magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : bits_as<uint32_t>(scaled);
    return bits_as<float>(top | sign);
}

// A byte in data units: 0..255 -> [-1, 1].
inline float widen(uint8_t x) { return (float(x) - 127.5f) * float(2 / 255.0); }

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, BFloat16& to) {
    uint32_t bits = bits_as<uint32_t>(x);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    to.bits = uint16_t(x == x ? rounded : 0x7FC0);
}

inline void narrow(float x, Float16& to) {
    uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7FFFFFFF;
    // below 2^-14 the sum with 0.5 rounds at the last bit of a subnormal float16
    uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000;
    uint32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    uint32_t top = magnitude < 0x38800000 ? subnormal : normal;
    top = magnitude >= 0x47800000 ? 0x7C00 : top;
    top = magnitude > 0x7F800000 ? 0x7E00 : top;
    to.bits = uint16_t(top | sign);
}

// Load LANES elements as floats, or store them. Only the first `count` are read or written; the others are loaded as 0.
template <class T>
Lanes load(const T* from, int count = LANES) {
    if constexpr (std::is_same_v<T, float>)
        if (count == LANES) return load(static_cast<const float*>(from));
    float values[LANES] = {};
    if (count == LANES)  // a constant, so that the compiler uses vectors
        for (int i = 0; i < LANES; ++i) values[i] = widen(from[i]);
    else
        for (int i = 0; i < count; ++i) values[i] = widen(from[i]);
    return load(values);
}

template <class T>
void store(Lanes lanes, T* to, int count) {
    if constexpr (std::is_same_v<T, float>)
        if (count == LANES) return store(lanes, static_cast<float*>(to));
    float values[LANES];
    store(lanes, values);
    if (count == LANES)
        for (int i = 0; i < LANES; ++i) narrow(values[i], to[i]);
    else
        for (int i = 0; i < count; ++i) narrow(values[i], to[i]);
}

// Call a function with a null pointer of the type that a dtype names.
template <class Function>
void with_float(int64_t dtype, Function function) {
    if (dtype == FLOAT32) return function(static_cast<float*>(nullptr));
    if (dtype == BFLOAT16) return function(static_cast<BFloat16*>(nullptr));
    assert(dtype == FLOAT16);
    function(static_cast<Float16*>(nullptr));
}

template <class Function>
void with_float_or_byte(int64_t dtype, Function function) {
    if (dtype == UINT8) return function(static_cast<uint8_t*>(nullptr));
    with_float(dtype, function);
}

}  // namespace fastddpm::FASTDDPM_ISA
