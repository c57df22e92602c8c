// Numbers of 16 bits and of 32 as the kernels' C++ reads and writes them.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

template <typename To, typename From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To same;
    std::memcpy(&same, &value, sizeof same);
    return same;
}

template <typename Value>
inline Value load(const void *from) {
    Value loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

inline float widen(float value) { return value; }

inline float widen(bf16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }

inline void narrow(float value, float *out) { *out = value; }

inline void narrow(float value, bf16 *out) {
    const uint32_t bits = bits_as<uint32_t>(value);
    // To the nearest, ties to even; a NaN must not become infinity by losing its low bits, nor a number by a carry.
    out->bits = value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __F16C__
inline float widen(fp16 value) { return _cvtsh_ss(value.bits); }

inline void narrow(float value, fp16 *out) { out->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#endif

}  // namespace
