// libjpeg's slow inverse DCT, of two blocks at a time, to the bits that libjpeg-turbo's SSE2 and AVX2 code gives:
// 16-bit numbers wrap around where those do, also in files that no camera makes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed within this file only

namespace convneur::jpeg {

// A row of two blocks, and 32-bit numbers of half of it: of columns 0 to 3, or 4 to 7, of the first, then the second.
typedef uint16_t Row __attribute__((vector_size(32)));
typedef uint32_t Half __attribute__((vector_size(32)));
typedef int32_t SignedHalf __attribute__((vector_size(32)));

// Numbers of a and b by turns, from the lower or upper half of each block.
template <bool UPPER>
inline Row interleaved(const Row& a, const Row& b) {
#ifdef __AVX2__
    const __m256i x = (__m256i)a, y = (__m256i)b;
    return (Row)(UPPER ? _mm256_unpackhi_epi16(x, y) : _mm256_unpacklo_epi16(x, y));
#else
    Row result = {};
    for (int i = 0; i < 16; i++) {
        const int from = i / 8 * 8 + (UPPER ? 4 : 0) + i % 8 / 2;
        result[i] = i % 2 ? b[from] : a[from];
    }
    return result;
#endif
}

// Of pairs of numbers, x0 * first + x1 * second.
inline Half weighted(const Row& pairs, int first, int second) {
#ifdef __AVX2__
    return (Half)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32((first & 0xffff) | second * 65536));
#else
    const SignedHalf both = (SignedHalf)pairs;
    return (Half)(both << 16 >> 16) * first + (Half)(both >> 16) * second;
#endif
}

// Both halves of a row, brought into 16 bits.
inline Row saturated(const SignedHalf& lower, const SignedHalf& upper) {
#ifdef __AVX2__
    return (Row)_mm256_packs_epi32((__m256i)lower, (__m256i)upper);
#else
    Row result = {};
    for (int i = 0; i < 16; i++)
        result[i] = std::clamp(i % 8 < 4 ? lower[i / 8 * 4 + i % 4] : upper[i / 8 * 4 + i % 4], -32768, 32767);
    return result;
#endif
}

inline void transpose(Row (&rows)[8]) {
    for (int round = 0; round < 3; round++) {
        const Row lower[4] = {rows[0], rows[1], rows[2], rows[3]};
        const Row upper[4] = {rows[4], rows[5], rows[6], rows[7]};
        for (int i = 0; i < 4; i++) {
            rows[2 * i] = interleaved<false>(lower[i], upper[i]);
            rows[2 * i + 1] = interleaved<true>(lower[i], upper[i]);
        }
    }
}

// Half of the columns of a pass down the columns.
template <int SHIFT, bool UPPER>
inline void half_of_pass(const Row (&in)[8], SignedHalf (&out)[8]) {
    const Row zero = {};
    const Row two_six = interleaved<UPPER>(in[2], in[6]);
    const Row three_four = interleaved<UPPER>(in[7] + in[3], in[5] + in[1]);
    const Row seven_one = interleaved<UPPER>(in[7], in[1]), five_three = interleaved<UPPER>(in[5], in[3]);
    const Half sum = (Half)((SignedHalf)interleaved<UPPER>(zero, in[0] + in[4]) >> 3);
    const Half difference = (Half)((SignedHalf)interleaved<UPPER>(zero, in[0] - in[4]) >> 3);
    const Half even3 = weighted(two_six, 10703, 4433), even2 = weighted(two_six, 4433, -10704);
    const Half z3 = weighted(three_four, -6436, 9633), z4 = weighted(three_four, 9633, 6437);
    const Half odd[4] = {weighted(seven_one, -7373, 4926) + z4, weighted(five_three, -20995, 4177) + z3,
                         weighted(five_three, -4176, -20995) + z4, weighted(seven_one, -4927, -7373) + z3};
    const Half even[4] = {sum + even3, difference + even2, difference - even2, sum - even3};
    const Half rounding = Half{} + (1u << (SHIFT - 1));
    for (int i = 0; i < 4; i++) {
        out[i] = (SignedHalf)(even[i] + odd[i] + rounding) >> SHIFT;
        out[7 - i] = (SignedHalf)(even[i] - odd[i] + rounding) >> SHIFT;
    }
}

template <int SHIFT>
inline void pass(Row (&rows)[8]) {
    SignedHalf lower[8], upper[8];
    half_of_pass<SHIFT, false>(rows, lower);
    half_of_pass<SHIFT, true>(rows, upper);
    for (int i = 0; i < 8; i++)
        rows[i] = saturated(lower[i], upper[i]);
}

// The first block of a, the second one of b.
inline Row joined(const Row& a, const Row& b) {
#ifdef __AVX2__
    return (Row)_mm256_blend_epi32((__m256i)a, (__m256i)b, 0xf0);
#else
    Row result = a;
    for (int i = 8; i < 16; i++)
        result[i] = b[i];
    return result;
#endif
}

// What the coefficients of a block were divided by, twice in each row; and where its samples go.
struct Target {
    const Row* quantiser;
    uint8_t* samples;
    ptrdiff_t stride;
};

// Makes samples of two blocks, whose coefficients lie beside each other, 16 in a row.
inline void idct(const int16_t* coefficients, const Target& one, const Target& other) {
    Row rows[8], below = {};
    for (int i = 0; i < 8; i++) {
        std::memcpy(&rows[i], coefficients + 16 * i, sizeof(Row));
        if (i > 0)
            below |= rows[i];
        rows[i] *= joined(one.quantiser[i], other.quantiser[i]);
    }
    const Row first = rows[0] << 2;
    pass<11>(rows);
    uint64_t parts[4];
    std::memcpy(parts, &below, sizeof parts);
    const bool one_is_flat = (parts[0] | parts[1]) == 0, other_is_flat = (parts[2] | parts[3]) == 0;
    if (__builtin_expect(one_is_flat || other_is_flat, 0))  // libjpeg-turbo doesn't saturate them
        for (Row& row : rows)
            row = joined(one_is_flat ? first : row, other_is_flat ? first : row);
    transpose(rows);
    pass<18>(rows);
    transpose(rows);
    for (int i = 0; i < 8; i++) {
#ifdef __AVX2__
        const __m256i bytes = _mm256_add_epi8(_mm256_packs_epi16((__m256i)rows[i], (__m256i)rows[i]),
                                              _mm256_set1_epi8(-128));
        _mm_storel_epi64((__m128i*)(one.samples + i * one.stride), _mm256_castsi256_si128(bytes));
        _mm_storel_epi64((__m128i*)(other.samples + i * other.stride), _mm256_extracti128_si256(bytes, 1));
#else
        for (int j = 0; j < 16; j++)
            (j < 8 ? one.samples + i * one.stride : other.samples + i * other.stride)[j % 8] =
                std::clamp<int>(static_cast<int16_t>(rows[i][j]), -128, 127) + 128;
#endif
    }
}

// Makes samples of a block that has only its first coefficient.
inline void flat_idct(int coefficient, const Target& block) {
    const int first = static_cast<int16_t>(static_cast<uint16_t>(coefficient * block.quantiser[0][0] * 4));
    const int sample = std::clamp((first + 16) >> 5, -128, 127) + 128;
    for (int i = 0; i < 8; i++)
        std::memset(block.samples + i * block.stride, sample, 8);
}

}  // namespace convneur::jpeg
