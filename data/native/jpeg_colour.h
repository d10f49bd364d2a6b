// libjpeg's fancy upsampling, and its conversion of YCbCr to RGB, to the bit.

#pragma once

#include "jpeg_vectors.h"

namespace convneur::jpeg {

constexpr int WIDE = 32;  // pixels that are coloured at once

// Doubles a row of samples: each new one is three parts the nearest one and one part its other neighbour, after the
// same was done with another row, or with the row itself where rows aren't doubled. Past the row's ends, the last
// samples count. `sums` has room for two more than there are samples, of 4 times their value.
inline void doubled(const uint8_t* __restrict row, const uint8_t* other, int count, bool rows_too,
                    uint16_t* __restrict sums, uint8_t* __restrict out) {
    for (int i = 0; i < count; i++)
        sums[i + 1] = 3 * row[i] + other[i];
    sums[0] = sums[1];
    sums[count + 1] = sums[count];
    const int left = rows_too ? 8 : 4, right = rows_too ? 7 : 8;  // roundings
    for (int i = 0; i < count; i++) {
        const int thrice = 3 * sums[i + 1];
        out[2 * i] = (thrice + sums[i] + left) >> 4;
        out[2 * i + 1] = (thrice + sums[i + 2] + right) >> 4;
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

// Makes WIDE pixels of RGB.
inline void colour(const uint8_t* luma, const uint8_t* blue, const uint8_t* red, uint8_t* out) {
#ifdef __AVX2__
    const auto bytes = [](const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); };
    // (x * factor + 2^15) >> 16 is ((2 * x * factor >> 16) + 1) >> 1.
    const auto scaled = [](Row x, int16_t factor) {
        const Row high = (Row)_mm256_mulhi_epi16((__m256i)(x + x), _mm256_set1_epi16(factor));
        return (Row)_mm256_srai_epi16((__m256i)(high + 1), 1);
    };
    __m256i rgb[3][2];
    for (int i = 0; i < 2; i++) {  // 8 of 16 pixels, twice
        const auto load = [&](const uint8_t* from) {
            const __m256i all = bytes(from), zero = {};
            return (Row)(i == 0 ? _mm256_unpacklo_epi8(all, zero) : _mm256_unpackhi_epi8(all, zero));
        };
        const Row y = load(luma), cb = load(blue) - 128, cr = load(red) - 128;
        const Half rounding = Half{} + 32768;
        const Half lower = weighted(interleaved<0>(cb, cr), -22554, 18734) + rounding;
        const Half upper = weighted(interleaved<4>(cb, cr), -22554, 18734) + rounding;
        rgb[0][i] = (__m256i)(y + cr + scaled(cr, 26345));  // 1.402 as 1 + 26345 / 2^16
        rgb[1][i] = (__m256i)(y - cr + saturated(shifted(lower, 16), shifted(upper, 16)));
        rgb[2][i] = (__m256i)(y + cb + cb + scaled(cb, -14942));
    }
    for (int part = 0; part < 3; part++) {
        __m256i mixed = {};
        for (int c = 0; c < 3; c++)
            mixed |= _mm256_shuffle_epi8(_mm256_packus_epi16(rgb[c][0], rgb[c][1]), bytes(SPREAD.from[part][c]));
        std::memcpy(out + 16 * part, &mixed, 16);
        std::memcpy(out + 48 + 16 * part, reinterpret_cast<const uint8_t*>(&mixed) + 16, 16);
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
