#include "passes.h"

#include <algorithm>
#include <vector>

#include "readable.h"
#include "vectors.h"

namespace convneur {
namespace {

uint8_t clip(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kPrecision, 0, 255)); }

void row_plainly(const uint8_t* pixels, const AxisWeights& axis, uint8_t* out) {
    for (size_t i = 0; i < axis.starts.size(); i++) {
        const int32_t* weights = &axis.weights[i * axis.taps];
        const uint8_t* from = pixels + 3 * static_cast<ptrdiff_t>(axis.starts[i]);
        int32_t sums[3] = {1 << (kPrecision - 1), 1 << (kPrecision - 1), 1 << (kPrecision - 1)};
        for (int k = 0; k < axis.counts[i]; k++)
            for (int c = 0; c < 3; c++) sums[c] += from[3 * k + c] * weights[k];
        for (int c = 0; c < 3; c++) out[3 * i + c] = clip(sums[c]);
    }
}

void column_plainly(const uint8_t* pixels, ptrdiff_t stride, int bytes, const AxisWeights& axis, int i, uint8_t* out) {
    constexpr int kBlock = 256;
    const int32_t* weights = &axis.weights[static_cast<size_t>(i) * axis.taps];
    int32_t sums[kBlock];
    for (int start = 0; start < bytes; start += kBlock) {
        const int count = std::min(kBlock, bytes - start);
        std::fill_n(sums, count, 1 << (kPrecision - 1));
        for (int k = 0; k < axis.counts[i]; k++) {
            const uint8_t* row = pixels + (axis.starts[i] + k) * stride + start;
            for (int x = 0; x < count; x++) sums[x] += row[x] * weights[k];
        }
        for (int x = 0; x < count; x++) out[start + x] = clip(sums[x]);
    }
}

#if defined(CONVNEUR_VECTORS)

// Pixels r0 g0 b0 r1 ... to int32s of four pixels' reds, greens and blues.
const __m128i kByColor = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);

// Groups of outputs of a row: where each begins, and its weights, for registers of kLanes outputs.
struct Groups {
    int quads;  // of inputs an output
    std::vector<int> starts;
    std::vector<int32_t> words;
};

void group(const AxisWeights& axis, int width, Groups& made) {
    const int count = static_cast<int>(axis.starts.size()), groups = (count + kGroup - 1) / kGroup;
    made.quads = (axis.taps + 3) / 4;
    made.starts.resize(groups * kGroup);
    made.words.resize(static_cast<size_t>(groups) * made.quads * kWords * kGroup * 4);
    std::vector<int32_t> weights(4 * made.quads);
    for (int i = 0; i < groups * kGroup; i++) {
        const int output = std::min(i, count - 1), start = axis.starts[output];
        made.starts[i] = 3 * readable_start(start, width, made.quads);
        std::fill(weights.begin(), weights.end(), 0);
        std::copy_n(&axis.weights[static_cast<size_t>(output) * axis.taps], axis.counts[output],
                    &weights[start - made.starts[i] / 3]);
        for (int q = 0; q < made.quads; q++) {
            const size_t block = (static_cast<size_t>(i / kGroup) * made.quads + q) * kWords * kGroup * 4;
            write_weights(&weights[4 * q], &made.words[block + i % kGroup * 4], 4, kGroup * 4);
        }
    }
}

template <int kQuads>
void row_of_groups(const uint8_t* pixels, const Groups& groups, uint8_t* out) {
    const Register by_color = every_lane(kByColor);
    const int quads = kQuads ? kQuads : groups.quads;
    const int32_t* words = groups.words.data();
    for (size_t i = 0; i < groups.starts.size(); i += kGroup, out += 3 * kGroup) {
        Sums sums[kRegisters];
        for (int q = 0; q < quads; q++, words += kWords * kGroup * 4) {
            for (int r = 0; r < kRegisters; r++) {
                const Register bytes = load_outputs(pixels + 12 * q, &groups.starts[i + r * kLanes]);
                Register weights[kWords];
                for (int w = 0; w < kWords; w++) weights[w] = load(words + (w * kGroup + r * kLanes) * 4);
                sums[r].add(CONVNEUR_OP(shuffle_epi8)(bytes, by_color), weights);
            }
        }
        Register totals[kRegisters];
        for (int r = 0; r < kRegisters; r++) totals[r] = sums[r].total();
        store_group(totals, out);
    }
}

void rows_in_groups(const uint8_t* pixels, ptrdiff_t stride, int rows, int width, const AxisWeights& axis, uint8_t* out,
                    ptrdiff_t out_stride) {
    static thread_local Groups groups;
    group(axis, width, groups);
    ReadableRows readable(pixels, stride, rows, width, groups.quads);
    const auto make = groups.quads == 1 ? row_of_groups<1> : groups.quads == 2 ? row_of_groups<2> : row_of_groups<0>;
    for (int y = 0; y < rows; y++) make(readable.row(y), groups, out + y * out_stride);
}

constexpr int kStep = 16 * kLanes;  // values of a row at a time

void step_down(const uint8_t* pixels, ptrdiff_t stride, int quads, int rest, const int32_t* words, uint8_t* out) {
    Sums sums[4];
    for (int q = 0; q < quads; q++, words += kWords) {
        Register weights[kWords], rows[4];
        for (int w = 0; w < kWords; w++) weights[w] = CONVNEUR_OP(set1_epi32)(words[w]);
        // The last four rows are those that are there, the last again and again: its weights are 0.
        for (int k = 0; k < 4; k++) rows[k] = load(pixels + (q == quads - 1 ? std::min(k, rest - 1) : k) * stride);
        pixels += 4 * stride;
        const Register low01 = CONVNEUR_OP(unpacklo_epi8)(rows[0], rows[1]);
        const Register low23 = CONVNEUR_OP(unpacklo_epi8)(rows[2], rows[3]);
        const Register high01 = CONVNEUR_OP(unpackhi_epi8)(rows[0], rows[1]);
        const Register high23 = CONVNEUR_OP(unpackhi_epi8)(rows[2], rows[3]);
        sums[0].add(CONVNEUR_OP(unpacklo_epi16)(low01, low23), weights);
        sums[1].add(CONVNEUR_OP(unpackhi_epi16)(low01, low23), weights);
        sums[2].add(CONVNEUR_OP(unpacklo_epi16)(high01, high23), weights);
        sums[3].add(CONVNEUR_OP(unpackhi_epi16)(high01, high23), weights);
    }
    const Register low = CONVNEUR_OP(packs_epi32)(sums[0].total(), sums[1].total());
    const Register high = CONVNEUR_OP(packs_epi32)(sums[2].total(), sums[3].total());
    store(out, CONVNEUR_OP(packus_epi16)(low, high));
}

#endif

}  // namespace

void resize_rows(const uint8_t* pixels, ptrdiff_t stride, int rows, int width, const AxisWeights& axis, uint8_t* out,
                 ptrdiff_t out_stride) {
#if defined(CONVNEUR_VECTORS)
    if (axis.narrow) return rows_in_groups(pixels, stride, rows, width, axis, out, out_stride);
#endif
    (void)width;
    for (int y = 0; y < rows; y++) row_plainly(pixels + y * stride, axis, out + y * out_stride);
}

void resize_column(const uint8_t* pixels, ptrdiff_t stride, int bytes, const AxisWeights& axis, int i, uint8_t* out) {
#if defined(CONVNEUR_VECTORS)
    if (axis.narrow && bytes >= kStep) {
        const int count = axis.counts[i], quads = (count + 3) / 4;
        static thread_local std::vector<int32_t> words;
        words.resize(static_cast<size_t>(quads) * kWords);
        for (int q = 0; q < quads; q++) {
            int32_t weights[4] = {};
            std::copy_n(&axis.weights[static_cast<size_t>(i) * axis.taps + 4 * q], std::min(4, count - 4 * q), weights);
            write_weights(weights, &words[static_cast<size_t>(q) * kWords], 1, 1);
        }
        const uint8_t* from = pixels + axis.starts[i] * stride;
        // The last step overlaps the one before.
        for (int x = 0; x < bytes; x += kStep) {
            const int at = std::min(x, bytes - kStep);
            step_down(from + at, stride, quads, count - 4 * (quads - 1), words.data(), out + at);
        }
        return;
    }
#endif
    column_plainly(pixels, stride, bytes, axis, i, out);
}

}  // namespace convneur
