// libjpeg's slow inverse DCT, of two blocks at a time, to the bits that libjpeg-turbo's SSE2 and AVX2 code gives:
// 16-bit numbers wrap around where those do, also in files that no camera makes.

#pragma once

#include "jpeg_vectors.h"

namespace convneur::jpeg {

inline void transpose(Row (&rows)[8]) {
    for (int round = 0; round < 3; round++) {
        const Row lower[4] = {rows[0], rows[1], rows[2], rows[3]};
        const Row upper[4] = {rows[4], rows[5], rows[6], rows[7]};
        for (int i = 0; i < 4; i++) {
            rows[2 * i] = interleaved<0>(lower[i], upper[i]);
            rows[2 * i + 1] = interleaved<4>(lower[i], upper[i]);
        }
    }
}

// Half of the columns of a pass down the columns.
template <int SHIFT, int FROM>
inline void half_of_pass(const Row (&in)[8], Half (&out)[8]) {
    const Row two_six = interleaved<FROM>(in[2], in[6]);
    const Row three_four = interleaved<FROM>(in[7] + in[3], in[5] + in[1]);
    const Row seven_one = interleaved<FROM>(in[7], in[1]), five_three = interleaved<FROM>(in[5], in[3]);
    const Half rounding = Half{} + (1u << (SHIFT - 1));
    const Half sum = shifted((Half)interleaved<FROM>(Row{}, in[0] + in[4]), 3) + rounding;
    const Half difference = shifted((Half)interleaved<FROM>(Row{}, in[0] - in[4]), 3) + rounding;
    const Half even3 = weighted(two_six, 10703, 4433), even2 = weighted(two_six, 4433, -10704);
    const Half z3 = weighted(three_four, -6436, 9633), z4 = weighted(three_four, 9633, 6437);
    const Half odd[4] = {weighted(seven_one, -7373, 4926) + z4, weighted(five_three, -20995, 4177) + z3,
                         weighted(five_three, -4176, -20995) + z4, weighted(seven_one, -4927, -7373) + z3};
    const Half even[4] = {sum + even3, difference + even2, difference - even2, sum - even3};
    for (int i = 0; i < 4; i++) {
        out[i] = shifted(even[i] + odd[i], SHIFT);
        out[7 - i] = shifted(even[i] - odd[i], SHIFT);
    }
}

template <int SHIFT>
inline void pass(Row (&rows)[8]) {
    Half lower[8], upper[8];
    half_of_pass<SHIFT, 0>(rows, lower);
    half_of_pass<SHIFT, 4>(rows, upper);
    for (int i = 0; i < 8; i++)
        rows[i] = saturated(lower[i], upper[i]);
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
        const Row samples = packed(rows[i] + 128);
        std::memcpy(one.samples + i * one.stride, &samples, 8);
        std::memcpy(other.samples + i * other.stride, reinterpret_cast<const uint8_t*>(&samples) + 16, 8);
    }
}

}  // namespace convneur::jpeg
