#include "tones.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace convneur {
namespace {

using Table = std::array<std::array<uint8_t, 256>, 3>;  // of each colour

void look_up(const Picture& picture, const Table& table) {
    const uint8_t* __restrict red = table[0].data();
    const uint8_t* __restrict green = table[1].data();
    const uint8_t* __restrict blue = table[2].data();
    uint8_t* __restrict end = picture.pixels + picture.bytes();
    for (uint8_t* __restrict at = picture.pixels; at < end; at += 3) {
        at[0] = red[at[0]];
        at[1] = green[at[1]];
        at[2] = blue[at[2]];
    }
}

uint8_t clip(float value) { return static_cast<uint8_t>(std::min(std::max(value, 0.f), 255.f)); }

// What Pillow's `Image.blend` makes of two values. Between them nothing has to be clipped, and nothing is changed by it.
inline uint8_t blend(int first, int second, float factor) {
    return clip(static_cast<float>(first) + factor * static_cast<float>(second - first));
}

// A block of values that are blended with others; with a factor of 0 or 1 Pillow copies one of them.
void blend_block(const uint8_t* __restrict first, uint8_t* __restrict second, int count, float factor) {
    for (int i = 0; i < count; i++) second[i] = blend(first[i], second[i], factor);
}

void blend_with(const Picture& picture, int value, float factor) {
    uint8_t* pixels = picture.pixels;
    const int64_t bytes = picture.bytes();
    const auto grey = static_cast<float>(value);
    for (int64_t i = 0; i < bytes; i++)
        pixels[i] = clip(grey + factor * static_cast<float>(static_cast<int>(pixels[i]) - value));
}

int luma(const uint8_t* pixel) { return (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16; }

// Writes each pixel's grey three times, and kPast bytes more. Returns their sum.
uint64_t greys(const uint8_t* pixels, int count, uint8_t* out) {
    uint64_t sum = 0;
    int i = 0;
#if defined(CONVNEUR_VECTORS)
    // 38470 is too much for 16 bits: half of it is taken with the red, half with the blue.
    const Register red_green = every_lane(_mm_setr_epi8(0, -1, 1, -1, 3, -1, 4, -1, 6, -1, 7, -1, 9, -1, 10, -1));
    const Register green_blue = every_lane(_mm_setr_epi8(1, -1, 2, -1, 4, -1, 5, -1, 7, -1, 8, -1, 10, -1, 11, -1));
    const Register thrice = every_lane(_mm_setr_epi8(0, 0, 0, 4, 4, 4, 8, 8, 8, 12, 12, 12, -1, -1, -1, -1));
    const Register first_weights = CONVNEUR_OP(set1_epi32)(19235 << 16 | 19595);
    const Register second_weights = CONVNEUR_OP(set1_epi32)(7471 << 16 | 19235);
    const int starts[4] = {0, 12, 24, 36};
    Register sums = CONVNEUR_OP(set1_epi32)(0);
    for (; i + 4 * kLanes + 2 <= count; i += 4 * kLanes, pixels += 12 * kLanes, out += 12 * kLanes) {
        const Register bytes = load_outputs(pixels, starts);
        const Register first = CONVNEUR_OP(madd_epi16)(CONVNEUR_OP(shuffle_epi8)(bytes, red_green), first_weights);
        const Register second = CONVNEUR_OP(madd_epi16)(CONVNEUR_OP(shuffle_epi8)(bytes, green_blue), second_weights);
        const Register exact = CONVNEUR_OP(add_epi32)(CONVNEUR_OP(add_epi32)(first, second),
                                                      CONVNEUR_OP(set1_epi32)(0x8000));
        const Register grey = CONVNEUR_OP(srli_epi32)(exact, 16);
        sums = CONVNEUR_OP(add_epi32)(sums, grey);
        uint8_t lanes[16 * kLanes];
        store(lanes, CONVNEUR_OP(shuffle_epi8)(grey, thrice));
        for (int lane = 0; lane < kLanes; lane++) std::memcpy(out + 12 * lane, lanes + 16 * lane, 16);
    }
    int32_t parts[4 * kLanes];
    store(parts, sums);
    for (const int32_t part : parts) sum += part;
#endif
    for (; i < count; i++, pixels += 3, out += 3) {
        const int grey = luma(pixels);
        sum += grey;
        std::memset(out, grey, 3);
    }
    return sum;
}

constexpr int kStep = 192;  // bytes: whole pixels, and whole registers

// Takes values into the least and the most there were at their places.
void widen(const uint8_t* __restrict values, uint8_t* __restrict least, uint8_t* __restrict most) {
    for (int i = 0; i < kStep; i++) {
        least[i] = std::min(least[i], values[i]);
        most[i] = std::max(most[i], values[i]);
    }
}

constexpr int kBlock = 1024, kPast = 4;  // pixels, and bytes behind them

}  // namespace

void invert(const Picture& picture) {
    uint8_t* pixels = picture.pixels;
    const int64_t bytes = picture.bytes();
    for (int64_t i = 0; i < bytes; i++) pixels[i] = 255 - pixels[i];
}

void posterize(const Picture& picture, int bits) {
    const auto mask = static_cast<uint8_t>(~((1 << (8 - bits)) - 1));
    uint8_t* pixels = picture.pixels;
    const int64_t bytes = picture.bytes();
    for (int64_t i = 0; i < bytes; i++) pixels[i] &= mask;
}

void solarize(const Picture& picture, double threshold) {
    uint8_t* pixels = picture.pixels;
    const int64_t bytes = picture.bytes();
    if (threshold > 255) return;
    const auto least = static_cast<uint8_t>(std::max(std::ceil(threshold), 0.));  // that is inverted
    for (int64_t i = 0; i < bytes; i++) pixels[i] = pixels[i] < least ? pixels[i] : 255 - pixels[i];
}

void solarize_add(const Picture& picture, int added, double threshold) {
    uint8_t* pixels = picture.pixels;
    const int64_t bytes = picture.bytes();
    const auto most = static_cast<uint8_t>(255 - added), more = static_cast<uint8_t>(added);
    const int least = static_cast<int>(std::clamp(std::ceil(threshold), 0., 256.));  // that stays
    const auto last = static_cast<uint8_t>(least - 1);
    if (least == 0) return;
    for (int64_t i = 0; i < bytes; i++) {
        const uint8_t value = pixels[i], sum = value < most ? value + more : 255;
        pixels[i] = value <= last ? sum : value;
    }
}

void auto_contrast(const Picture& picture) {
    uint8_t least[kStep], most[kStep];
    std::fill_n(least, kStep, 255);
    std::fill_n(most, kStep, 0);
    const int64_t bytes = picture.bytes(), whole = bytes - bytes % kStep;
    for (int64_t start = 0; start < whole; start += kStep) widen(picture.pixels + start, least, most);
    for (int64_t i = whole; i < bytes; i++) {
        least[i - whole] = std::min(least[i - whole], picture.pixels[i]);
        most[i - whole] = std::max(most[i - whole], picture.pixels[i]);
    }
    Table table;
    for (int c = 0; c < 3; c++) {
        int low = 255, high = 0;
        for (int i = c; i < kStep; i += 3) low = std::min<int>(low, least[i]), high = std::max<int>(high, most[i]);
        const double scale = 255.0 / std::max(high - low, 1), offset = -low * scale;
        for (int i = 0; i < 256; i++)
            table[c][i] = static_cast<uint8_t>(high <= low ? i : std::clamp(static_cast<int>(i * scale + offset), 0, 255));
    }
    look_up(picture, table);
}

void equalize(const Picture& picture) {
    // Two tables, as neighbours are often equal and would wait for each other.
    uint32_t counts[2 * 3 * 256] = {};
    const int64_t pixels = picture.bytes() / 3;
    const uint8_t* at = picture.pixels;
    for (int64_t i = 0; i < pixels; i++, at += 3) {
        uint32_t* of = counts + (i & 1) * 3 * 256;
        of[at[0]]++;
        of[256 + at[1]]++;
        of[512 + at[2]]++;
    }
    Table table;
    for (int c = 0; c < 3; c++) {
        int64_t of[256] = {}, last = 0;
        int kinds = 0;
        for (int i = 0; i < 256; i++) {
            of[i] = counts[c * 256 + i] + counts[(3 + c) * 256 + i];
            if (of[i]) kinds++, last = of[i];
        }
        const int64_t step = kinds > 1 ? (pixels - last) / 255 : 0;
        int64_t n = step / 2;
        for (int i = 0; i < 256; i++) {
            table[c][i] = static_cast<uint8_t>(step ? std::min<int64_t>(n / step, 255) : i);
            n += of[i];
        }
    }
    look_up(picture, table);
}

void color(const Picture& picture, float factor) {
    if (factor == 1.f) return;
    uint8_t grey[3 * kBlock + kPast];
    const int64_t pixels = picture.bytes() / 3;
    for (int64_t start = 0; start < pixels; start += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kBlock, pixels - start));
        uint8_t* at = picture.pixels + 3 * start;
        greys(at, count, grey);
        if (factor == 0.f)
            std::memcpy(at, grey, 3 * static_cast<size_t>(count));
        else
            blend_block(grey, at, 3 * count, factor);
    }
}

void contrast(const Picture& picture, float factor) {
    if (factor == 1.f) return;
    uint8_t grey[3 * kBlock + kPast];
    uint64_t sum = 0;
    const int64_t pixels = picture.bytes() / 3;
    for (int64_t start = 0; start < pixels; start += kBlock)
        sum += greys(picture.pixels + 3 * start, static_cast<int>(std::min<int64_t>(kBlock, pixels - start)), grey);
    const int mean = static_cast<int>(static_cast<double>(sum) / static_cast<double>(pixels) + 0.5);
    blend_with(picture, mean, factor);
}

void brightness(const Picture& picture, float factor) {
    if (factor != 1.f) blend_with(picture, 0, factor);
}

void sharpness(const Picture& picture, float factor) {
    const int height = picture.height, bytes = 3 * picture.width;
    if (factor == 1.f || height < 3 || picture.width < 3) return;
    std::vector<uint8_t> before(picture.row(0), picture.row(0) + bytes), at(bytes), smooth(bytes);
    for (int y = 1; y < height - 1; y++) {
        uint8_t* row = picture.row(y);
        std::copy_n(row, bytes, at.begin());
        const uint8_t *a = picture.row(y + 1), *b = at.data(), *c = before.data();
        for (int x = 3; x < bytes - 3; x++) {
            // Pillow sums in floats, but no sum of thirteenths comes as near to a half as they err.
            const uint16_t sum = a[x - 3] + a[x] + a[x + 3] + b[x - 3] + 5 * b[x] + b[x + 3] + c[x - 3] + c[x] + c[x + 3];
            const uint16_t twice = 2 * sum + 13, share = (twice * 40330u) >> 16;  // of 16 x 26
            smooth[x] = static_cast<uint8_t>(share >> 4);
        }
        if (factor == 0.f)
            std::copy(smooth.begin() + 3, smooth.end() - 3, row + 3);
        else
            blend_block(&smooth[3], row + 3, bytes - 6, factor);
        before.swap(at);
    }
}

}  // namespace convneur
