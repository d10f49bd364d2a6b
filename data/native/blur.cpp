#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tones.h"

namespace convneur {
namespace {

// Pillow's box: whole pixels up to `radius` away, and a share of the next ones.
struct BoxFilter {
    int radius;
    uint32_t whole, share;  // weights, of 2^24

    explicit BoxFilter(float exact) {
        radius = static_cast<int>(exact);
        whole = static_cast<uint32_t>(static_cast<float>(1 << 24) / (exact * 2 + 1));
        share = ((1u << 24) - (radius * 2 + 1) * whole) / 2;
    }

    uint8_t value(uint32_t sum, uint32_t next) const {
        return static_cast<uint8_t>((sum * whole + next * share + (1u << 23)) >> 24);
    }
};

// The radius of the boxes that stand for a Gaussian, in floats and doubles as Pillow's C mixes them.
float box_radius(float sigma, int passes) {
    const float variance = sigma * sigma / static_cast<float>(passes);
    const auto length = static_cast<float>(std::sqrt(12.0 * variance + 1.0));
    const auto whole = static_cast<float>(std::floor((length - 1.0) / 2.0));
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    return whole + part;
}

// The sums of boxes along a row, from the copy with repeated ends.
template <int kRadius>
void sum_boxes(const uint8_t* __restrict from, int bytes, int radius, uint32_t* __restrict sums) {
    for (int x = 0; x < bytes; x++) {
        uint32_t sum = from[x];
        for (int k = 1; k <= 2 * kRadius; k++) sum += from[3 * k + x];
        sums[x] = sum;
    }
    for (int k = 2 * kRadius + 1; k <= 2 * radius; k++)
        for (int x = 0; x < bytes; x++) sums[x] += from[3 * k + x];
}

// A row of `width` pixels.
void along_row(uint8_t* __restrict row, int width, const BoxFilter& filter, std::vector<uint8_t>& padded,
               std::vector<uint32_t>& room) {
    const BoxFilter box = filter;
    const int edge = 3 * (box.radius + 1), bytes = 3 * width;
    padded.resize(bytes + 2 * edge);
    room.resize(bytes);
    uint8_t* __restrict copy = padded.data();
    uint32_t* __restrict sums = room.data();
    std::memcpy(copy + edge, row, bytes);
    for (int i = 0; i < edge; i += 3) {
        std::memcpy(copy + i, row, 3);
        std::memcpy(copy + edge + bytes + i, row + bytes - 3, 3);
    }
    (box.radius == 0 ? sum_boxes<0> : sum_boxes<1>)(copy + 3, bytes, box.radius, sums);
    for (int x = 0; x < bytes; x++) row[x] = box.value(sums[x], copy[x] + copy[2 * edge + x]);
}

// All columns, of a picture into another.
void down_columns(const Picture& from, const Picture& to, const BoxFilter& filter, std::vector<uint32_t>& room) {
    const BoxFilter box = filter;
    const int bytes = 3 * from.width, last = from.height - 1;
    const auto row = [&](int y) { return from.row(std::clamp(y, 0, last)); };
    room.assign(bytes, 0);
    uint32_t* __restrict sums = room.data();
    for (int k = -box.radius - 1; k < box.radius; k++) {
        const uint8_t* first = row(k);
        for (int x = 0; x < bytes; x++) sums[x] += first[x];
    }
    for (int y = 0; y <= last; y++) {
        const uint8_t *old = row(y - box.radius - 1), *added = row(y + box.radius), *next = row(y + box.radius + 1);
        uint8_t* __restrict out = to.row(y);
        for (int x = 0; x < bytes; x++) {
            sums[x] += added[x] - old[x];
            out[x] = box.value(sums[x], old[x] + next[x]);
        }
    }
}

}  // namespace

void gaussian_blur(const Picture& picture, float radius) {
    constexpr int kPasses = 3;
    if (radius == 0) return;
    const float exact = box_radius(radius, kPasses);
    if (exact == 0) return;
    const BoxFilter box(exact);
    std::vector<uint8_t> bytes(picture.bytes());
    std::vector<uint32_t> sums;
    for (int y = 0; y < picture.height; y++)
        for (int pass = 0; pass < kPasses; pass++) along_row(picture.row(y), picture.width, box, bytes, sums);
    bytes.resize(picture.bytes());
    const Picture other{bytes.data(), picture.height, picture.width};
    down_columns(picture, other, box, sums);
    down_columns(other, picture, box, sums);
    down_columns(picture, other, box, sums);
    std::copy(bytes.begin(), bytes.begin() + picture.bytes(), picture.pixels);
}

}  // namespace convneur
