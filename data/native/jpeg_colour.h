// libjpeg's fancy upsampling, and its conversion of YCbCr to RGB, to the bit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace convneur::jpeg {

constexpr int WIDE = 32;  // pixels that are coloured at once

// Three quarters of a row and a quarter of the other, times 4; or, without another, the row.
inline void add_up(const uint8_t* __restrict row, const uint8_t* __restrict other, int count,
                   uint16_t* __restrict sums) {
    if (other)
        for (int i = 0; i < count; i++)
            sums[i] = 3 * row[i] + other[i];
    else
        std::copy_n(row, count, sums);
}

// Doubles what add_up has made, each number between its neighbours, which must be there also for the first and last.
template <bool OF_TWO_ROWS>
inline void doubled(const uint16_t* __restrict sums, int count, uint8_t* __restrict out) {
    constexpr int SHIFT = OF_TWO_ROWS ? 4 : 2, LEFT = OF_TWO_ROWS ? 8 : 1, RIGHT = OF_TWO_ROWS ? 7 : 2;
    for (int i = 0; i < count; i++) {
        const uint16_t thrice = sums[i] * 3;
        out[2 * i] = static_cast<uint16_t>(thrice + sums[i - 1] + LEFT) >> SHIFT;
        out[2 * i + 1] = static_cast<uint16_t>(thrice + sums[i + 1] + RIGHT) >> SHIFT;
    }
}

// Which of 16 numbers of a channel goes to which byte of 16 pixels of RGB, twice; 128: none.
struct Spread {
    alignas(32) uint8_t from[3][3][32];

    constexpr Spread() : from() {
        for (int i = 0; i < 288; i++) {
            const int byte = i / 96 * 16 + i % 16, channel = i / 32 % 3;
            from[i / 96][channel][i % 32] = byte % 3 == channel ? byte / 3 : 128;
        }
    }
};
constexpr Spread SPREAD;

#ifdef __AVX2__
// 16 pixels, of which R, G and B take a 16-bit number each.
inline void coloured(__m256i y, __m256i cb, __m256i cr, __m256i (&rgb)[3]) {
    const __m256i half = _mm256_set1_epi16(128), one = _mm256_set1_epi16(1);
    cb = _mm256_sub_epi16(cb, half);
    cr = _mm256_sub_epi16(cr, half);
    const __m256i cb2 = _mm256_add_epi16(cb, cb), cr2 = _mm256_add_epi16(cr, cr);
    // (x * factor + 2^15) >> 16 is ((2 * x * factor >> 16) + 1) >> 1.
    const auto scaled = [&](__m256i twice, int factor) {
        const __m256i product = _mm256_mulhi_epi16(twice, _mm256_set1_epi16(static_cast<int16_t>(factor)));
        return _mm256_srai_epi16(_mm256_add_epi16(product, one), 1);
    };
    const __m256i weights = _mm256_set1_epi32((-22554 & 0xffff) | 18734 << 16), rounding = _mm256_set1_epi32(32768);
    const auto weighted_sum = [&](__m256i pairs) {
        return _mm256_srai_epi32(_mm256_add_epi32(_mm256_madd_epi16(pairs, weights), rounding), 16);
    };
    const __m256i both = _mm256_packs_epi32(weighted_sum(_mm256_unpacklo_epi16(cb, cr)),
                                            weighted_sum(_mm256_unpackhi_epi16(cb, cr)));
    rgb[0] = _mm256_add_epi16(y, _mm256_add_epi16(cr, scaled(cr2, 26345)));  // 1.402 as 1 + 26345 / 2^16
    rgb[1] = _mm256_add_epi16(y, _mm256_sub_epi16(both, cr));
    rgb[2] = _mm256_add_epi16(y, _mm256_add_epi16(cb2, scaled(cb2, -14942)));
}
#endif

// WIDE pixels of RGB, which take 3 * WIDE bytes.
inline void coloured(const uint8_t* luma, const uint8_t* blue, const uint8_t* red, uint8_t* out) {
#ifdef __AVX2__
    const auto bytes = [](const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); };
    const __m256i y = bytes(luma), cb = bytes(blue), cr = bytes(red), zero = _mm256_setzero_si256();
    const auto low = [&](__m256i x) { return _mm256_unpacklo_epi8(x, zero); };
    const auto high = [&](__m256i x) { return _mm256_unpackhi_epi8(x, zero); };
    __m256i lower[3], upper[3];
    coloured(low(y), low(cb), low(cr), lower);
    coloured(high(y), high(cb), high(cr), upper);
    for (int c = 0; c < 3; c++)
        lower[c] = _mm256_packus_epi16(lower[c], upper[c]);
    for (int part = 0; part < 3; part++) {
        const auto spread = [&](int c) { return _mm256_shuffle_epi8(lower[c], bytes(SPREAD.from[part][c])); };
        const __m256i mixed = _mm256_or_si256(spread(0), _mm256_or_si256(spread(1), spread(2)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * part), _mm256_castsi256_si128(mixed));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 48 + 16 * part), _mm256_extracti128_si256(mixed, 1));
    }
#else
    for (int i = 0; i < WIDE; i++) {
        const int y = luma[i], cb = blue[i] - 128, cr = red[i] - 128;
        out[3 * i] = std::clamp(y + ((91881 * cr + 32768) >> 16), 0, 255);
        out[3 * i + 1] = std::clamp(y + ((-22554 * cb - 46802 * cr + 32768) >> 16), 0, 255);
        out[3 * i + 2] = std::clamp(y + ((116130 * cb + 32768) >> 16), 0, 255);
    }
#endif
}

}  // namespace convneur::jpeg
