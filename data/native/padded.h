// Pixels of four bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace convneur {

// Writes `count` pixels of reds, greens, blues and a fourth byte each without that byte.
inline void write_pixels(const uint8_t* padded, int count, uint8_t* out) {
    int x = 0;
#if defined(CONVNEUR_VECTORS)
    const __m128i packed = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (; x + 6 <= count; x += 4, out += 12) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(padded + 4 * x));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(bytes, packed));
    }
#endif
    for (; x < count; x++, out += 3) std::memcpy(out, padded + 4 * x, 3);
}

}  // namespace convneur
