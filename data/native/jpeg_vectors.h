// Vectors of the compiler's, which become registers of any processor, with what three instructions of AVX2 give.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // they are passed within a file only

namespace convneur::jpeg {

// 16 numbers, for instance a row of two blocks, and 32-bit numbers of half of them: 0 to 3 and 8 to 11, or the others.
// Unsigned ones may wrap around.
typedef uint16_t Row __attribute__((vector_size(32)));
typedef uint32_t Half __attribute__((vector_size(32)));
typedef int32_t SignedHalf __attribute__((vector_size(32)));

// Numbers of a half of one, and of the other, by turns.
template <int FROM>
inline Row interleaved(const Row& one, const Row& other) {
    const Row a = one, b = other;
    constexpr int i = FROM, j = FROM + 8;
    return Row{a[i], b[i], a[i + 1], b[i + 1], a[i + 2], b[i + 2], a[i + 3], b[i + 3],
               a[j], b[j], a[j + 1], b[j + 1], a[j + 2], b[j + 2], a[j + 3], b[j + 3]};
}

// The first eight of one, the last eight of the other.
inline Row joined(const Row& one, const Row& other) {
    const Row a = one, b = other;
    return Row{a[0], a[1], a[2],  a[3],  a[4],  a[5],  a[6],  a[7],
               b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]};
}

inline Half shifted(const Half& a, int bits) { return (Half)((SignedHalf)a >> bits); }

// Of pairs of numbers, x0 * first + x1 * second.
inline Half weighted(const Row& pairs, int first, int second) {
#ifdef __AVX2__
    return (Half)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32((first & 0xffff) | second * 65536));
#else
    const Half both = (Half)pairs;
    return shifted(both << 16, 16) * first + shifted(both, 16) * second;
#endif
}

// Both halves, brought into 16 bits.
inline Row saturated(const Half& lower, const Half& upper) {
#ifdef __AVX2__
    return (Row)_mm256_packs_epi32((__m256i)lower, (__m256i)upper);
#else
    Row result = {};
    for (int i = 0; i < 16; i++)
        result[i] = std::clamp(static_cast<int>((i % 8 < 4 ? lower : upper)[i / 8 * 4 + i % 4]), -32768, 32767);
    return result;
#endif
}

// As bytes, brought into their range: of eight numbers, at the place of the first four.
inline Row packed(const Row& a) {
#ifdef __AVX2__
    return (Row)_mm256_packus_epi16((__m256i)a, (__m256i)a);
#else
    uint8_t bytes[32];
    for (int i = 0; i < 16; i++)
        bytes[i / 8 * 16 + i % 8] = std::clamp<int>(static_cast<int16_t>(a[i]), 0, 255);
    Row result;
    std::memcpy(&result, bytes, sizeof result);
    return result;
#endif
}

}  // namespace convneur::jpeg
