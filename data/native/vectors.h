// Registers of 1, 2 or 4 lanes of 16 bytes, by what the processor has: SSSE3, AVX2 or AVX-512.
#pragma once

#if defined(__AVX512BW__) || defined(__AVX2__) || defined(__SSSE3__)
#define CONVNEUR_VECTORS 1
// GCC 12's own headers use registers before they are set, by design.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "weights.h"

namespace convneur {

#if defined(__AVX512BW__)
constexpr int kLanes = 4;
using Register = __m512i;
#define CONVNEUR_OP(name) _mm512_##name
inline Register load(const void* from) { return _mm512_loadu_si512(from); }
inline void store(void* to, Register a) { _mm512_storeu_si512(to, a); }
inline Register every_lane(__m128i a) { return _mm512_broadcast_i32x4(a); }
inline Register bits_and(Register a, Register b) { return _mm512_and_si512(a, b); }
inline Register lanes_of(const uint8_t* const* from) {
    Register made = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[0])));
    made = _mm512_inserti32x4(made, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[1])), 1);
    made = _mm512_inserti32x4(made, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[2])), 2);
    return _mm512_inserti32x4(made, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[3])), 3);
}
#elif defined(__AVX2__)
constexpr int kLanes = 2;
using Register = __m256i;
#define CONVNEUR_OP(name) _mm256_##name
inline Register load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, Register a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
inline Register every_lane(__m128i a) { return _mm256_broadcastsi128_si256(a); }
inline Register bits_and(Register a, Register b) { return _mm256_and_si256(a, b); }
inline Register lanes_of(const uint8_t* const* from) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[0]))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[1])), 1);
}
#else
constexpr int kLanes = 1;
using Register = __m128i;
#define CONVNEUR_OP(name) _mm_##name
inline Register load(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline void store(void* to, Register a) { _mm_storeu_si128(static_cast<__m128i*>(to), a); }
inline Register every_lane(__m128i a) { return a; }
inline Register bits_and(Register a, Register b) { return _mm_and_si128(a, b); }
inline Register lanes_of(const uint8_t* const* from) { return load(from[0]); }
#endif

// Four pixels at a time are weighted: an int32 of a register holds a byte of each. Where the processor multiplies
// bytes and adds (VNNI), a weight is 2^16 a + 2^8 b + c in signed bytes; else 2^8 a + b in 16 bits, with b >= 0.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int kWords = 3;
#else
constexpr int kWords = 4;
#endif

// Writes four weights as kWords words, each `repeats` times.
inline void write_weights(const int32_t* weights, int32_t* words, int repeats, int step) {
    uint32_t made[kWords] = {};
    for (int k = 0; k < 4; k++) {
        if (kWords == 3) {
            const int c = static_cast<int8_t>(weights[k] & 255), above = (weights[k] - c) >> 8;
            const int b = static_cast<int8_t>(above & 255), a = (above - b) >> 8;
            const int parts[3] = {a, b, c};
            for (int i = 0; i < 3; i++) made[i] |= static_cast<uint32_t>(parts[i] & 255) << (8 * k);
        } else {
            const int shift = k < 2 ? 0 : 16;
            made[k % 2] |= static_cast<uint32_t>((weights[k] >> 8) & 0xffff) << shift;
            made[k % 2 + 2] |= static_cast<uint32_t>(weights[k] & 255) << shift;
        }
    }
    for (int i = 0; i < kWords; i++)
        for (int r = 0; r < repeats; r++) words[i * step + r] = static_cast<int32_t>(made[i]);
}

// Weighted sums of int32s of four bytes, with 2^(kPrecision - 1) added for rounding.
class Sums {
public:
    Sums() {
        for (auto& part : parts_) part = CONVNEUR_OP(set1_epi32)(0);
        parts_[kWords == 3 ? 2 : 1] = CONVNEUR_OP(set1_epi32)(1 << (kPrecision - 1));
    }

    void add(Register bytes, const Register (&words)[kWords]) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
        for (int i = 0; i < 3; i++) parts_[i] = _mm512_dpbusd_epi32(parts_[i], bytes, words[i]);
#else
        const Register even = bits_and(bytes, CONVNEUR_OP(set1_epi32)(0x00ff00ff));
        const Register odd = CONVNEUR_OP(srli_epi16)(bytes, 8);
        for (int i = 0; i < 2; i++) {
            const Register products = CONVNEUR_OP(add_epi32)(CONVNEUR_OP(madd_epi16)(even, words[2 * i]),
                                                             CONVNEUR_OP(madd_epi16)(odd, words[2 * i + 1]));
            parts_[i] = CONVNEUR_OP(add_epi32)(parts_[i], products);
        }
#endif
    }

    // Without the bits behind the point; not yet clipped to a byte.
    Register total() const {
        Register sum = parts_[0];
        for (int i = 1; i < kParts; i++)
            sum = CONVNEUR_OP(add_epi32)(CONVNEUR_OP(slli_epi32)(sum, 8), parts_[i]);
        return CONVNEUR_OP(srai_epi32)(sum, kPrecision);
    }

private:
    static constexpr int kParts = kWords == 3 ? 3 : 2;
    Register parts_[kParts];
};

constexpr int kGroup = 4, kRegisters = kGroup / kLanes;  // outputs side by side, and the registers that they take

// Loads 16 bytes for each output of a register: those at `starts` and on.
inline Register load_outputs(const uint8_t* row, const int* starts) {
    const uint8_t* from[kLanes];
    for (int lane = 0; lane < kLanes; lane++) from[lane] = row + starts[lane];
    return lanes_of(from);
}

// Writes the int32s of a group as 16 int16s.
inline void store_halves(const Register (&sums)[kRegisters], int16_t* out) {
#if defined(__AVX512BW__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtsepi32_epi16(sums[0]));
#elif defined(__AVX2__)
    store(out, _mm256_permute4x64_epi64(_mm256_packs_epi32(sums[0], sums[1]), 0xd8));
#else
    store(out, _mm_packs_epi32(sums[0], sums[1]));
    store(out + 8, _mm_packs_epi32(sums[2], sums[3]));
#endif
}

// Writes the 12 bytes of a group, of int32s red, green, blue and anything, clipped to a byte; and 4 bytes more.
inline void store_group(const Register (&sums)[kRegisters], uint8_t* out) {
    const __m128i packed = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
#if defined(__AVX512BW__)
    const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(sums[0], _mm512_setzero_si512()));
#elif defined(__AVX2__)
    const __m256i words = _mm256_packs_epi32(sums[0], sums[1]), both = _mm256_packus_epi16(words, words);
    const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
#else
    const __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3]));
#endif
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(bytes, packed));
}

}  // namespace convneur

#endif
