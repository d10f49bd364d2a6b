#include "area.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "padded.h"
#include "readable.h"
#include "vectors.h"

namespace convneur {
namespace {

// An axis as OpenCV's resize sees it: 1 / (out / in) needn't be in / out.
struct Axis {
    int size, out_size;
    double inverse, scale;

    Axis(int in_size, int out) : size(in_size), out_size(out) {
        inverse = static_cast<double>(out_size) / size;
        scale = 1. / inverse;
    }

    bool is_whole() const { return std::abs(scale - std::nearbyint(scale)) < DBL_EPSILON; }

    // Appends the inputs of an output where the side doesn't grow: the first's index and their weights.
    int mean(int out, std::vector<float>& weights) const {
        const double begin = out * scale, end = begin + scale, cell = std::min(scale, size - begin);
        const int last = std::min(static_cast<int>(std::floor(end)), size - 1);
        const int first = std::min(static_cast<int>(std::ceil(begin)), last);
        const bool is_before = first - begin > 1e-3;
        if (is_before) weights.push_back(static_cast<float>((first - begin) / cell));
        for (int i = first; i < last; i++) weights.push_back(static_cast<float>(1. / cell));
        if (end - last > 1e-3) weights.push_back(static_cast<float>(std::min({end - last, 1., cell}) / cell));
        return first - is_before;
    }

    // The first of an output's two inputs where a side grows, and the second's weight.
    int pair(int out, float& second) const {
        const int first = static_cast<int>(std::floor(out * scale));
        const float beyond = static_cast<float>((out + 1) - (first + 1) * inverse);
        second = beyond <= 0 ? 0.f : beyond - std::floor(beyond);
        return first;
    }
};

// The weights of a window's outputs along an axis; starts count from the window's support.
struct Weights {
    int taps = 0;
    std::vector<int> starts;
    std::vector<float> weights;  // `taps` for each output, those it hasn't 0
};

struct Span {
    int begin, length;
};

enum class Kind { kCopy, kWhole, kMeans, kPairs };

Kind kind_of(const Axis& down, const Axis& across) {
    if (down.size == down.out_size && across.size == across.out_size) return Kind::kCopy;
    if (down.scale < 1 || across.scale < 1) return Kind::kPairs;
    return down.is_whole() && across.is_whole() ? Kind::kWhole : Kind::kMeans;
}

Span span(const Axis& axis, Kind kind, int first, int count) {
    if (kind == Kind::kCopy) return {first, count};
    int begin, end;
    if (kind == Kind::kPairs) {
        float second;
        begin = std::min(axis.pair(first, second), axis.size - 1);
        end = std::min(axis.pair(first + count - 1, second) + 2, axis.size);
    } else {
        std::vector<float> weights;
        begin = axis.mean(first, weights);
        weights.clear();
        end = axis.mean(first + count - 1, weights);
        end += static_cast<int>(weights.size());
    }
    return {begin, end - begin};
}

void fill_means(const Axis& axis, int first, int count, bool flip, int begin, Weights& made) {
    std::vector<std::vector<float>> each(count);
    made.starts.resize(count);
    made.taps = 1;
    for (int i = 0; i < count; i++) {
        const int at = flip ? count - 1 - i : i;
        made.starts[at] = axis.mean(first + i, each[at]) - begin;
        made.taps = std::max(made.taps, static_cast<int>(each[at].size()));
    }
    made.weights.assign(static_cast<size_t>(count) * made.taps, 0.f);
    for (int i = 0; i < count; i++)
        std::copy(each[i].begin(), each[i].end(), &made.weights[static_cast<size_t>(i) * made.taps]);
}

uint8_t to_byte(float value) {
    constexpr float kHalfEven = 12582912.f;  // 1.5 x 2^23: added and taken away, it rounds as the processor does
    return static_cast<uint8_t>(std::clamp((value + kHalfEven) - kHalfEven, 0.f, 255.f));
}

// Sums of whole cells, as integers.
void make_whole(const Resize& r, int high, int wide, const uint8_t* pixels, ptrdiff_t stride, uint8_t* out,
                ptrdiff_t out_stride) {
    const float share = 1.f / (high * wide);
    const int bytes = 3 * wide * r.window.width;
    static thread_local std::vector<int32_t> sums;
    sums.resize(bytes);
    for (int y = 0; y < r.window.height; y++) {
        const uint8_t* cell = pixels + static_cast<ptrdiff_t>(r.vflip ? r.window.height - 1 - y : y) * high * stride;
        std::fill(sums.begin(), sums.end(), 0);
        for (int i = 0; i < high; i++)
            for (int x = 0; x < bytes; x++) sums[x] += cell[i * stride + x];
        for (int x = 0; x < r.window.width; x++) {
            const int32_t* column = &sums[3 * wide * (r.hflip ? r.window.width - 1 - x : x)];
            for (int c = 0; c < 3; c++) {
                int32_t sum = 0;
                for (int k = 0; k < wide; k++) sum += column[3 * k + c];
                const bool is_quarter = high == 2 && wide == 2;
                out[y * out_stride + 3 * x + c] = is_quarter ? (sum + 2) >> 2 : to_byte(sum * share);
            }
        }
    }
}

// Rows of means: of each output red, green, blue and 0 as floats, in groups of four outputs.
class MeanRows {
public:
    MeanRows(const Weights& across, const uint8_t* pixels, ptrdiff_t stride, Box needed)
        : count_(static_cast<int>(across.starts.size())), quads_((across.taps + 3) / 4),
          rows_(pixels, stride, needed.height, needed.width, quads_), starts_(values() / 4),
          weights_(static_cast<size_t>(values()) * 4 * quads_), made_(values()) {
        for (int i = 0; i < values() / 4; i++) {
            const int output = std::min(i, count_ - 1), start = across.starts[output];
            const int from = readable_start(start, needed.width, quads_);
            starts_[i] = 3 * from;
            for (int k = 0; k < std::min(across.taps, needed.width - start); k++) {
                const float weight = across.weights[static_cast<size_t>(output) * across.taps + k];
                const int tap = k + start - from;
                float* to = &weights_[(static_cast<size_t>(i / 4) * 4 * quads_ + tap) * 16 + i % 4 * 4];
                std::fill_n(to, 4, weight);
            }
        }
    }

    int values() const { return (count_ + 3) / 4 * 16; }

    // The means along row `y`, kept until another is asked for.
    const float* row(int y) {
        if (y != at_) make(rows_.row(y));
        at_ = y;
        return made_.data();
    }

private:
    void make(const uint8_t* row) {
        const float* weights = weights_.data();
        for (int i = 0; i < values() / 4; i += 4, weights += 64 * quads_) {
#if defined(CONVNEUR_VECTORS)
            for (int r = 0; r < kRegisters; r++) mean(row, &starts_[i + r * kLanes], weights + 4 * kLanes * r, i, r);
#else
            for (int j = i; j < i + 4; j++)
                for (int c = 0; c < 3; c++) {
                    float sum = 0.f;
                    for (int k = 0; k < 4 * quads_; k++)
                        sum += row[starts_[j] + 3 * k + c] * weights[16 * k + 4 * (j - i)];
                    made_[4 * j + c] = sum;
                }
#endif
        }
    }

#if defined(CONVNEUR_VECTORS)
    void mean(const uint8_t* row, const int* starts, const float* weights, int i, int r) {
        auto sum = CONVNEUR_OP(setzero_ps)();
        for (int q = 0; q < quads_; q++) {
            const Register bytes = load_outputs(row + 12 * q, starts);
            for (int k = 0; k < 4; k++, weights += 16) {
                const int b = 3 * k;
                const Register pixel = every_lane(
                    _mm_setr_epi8(b, -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1, -1, -1, -1, -1, -1, -1));
                const auto values = CONVNEUR_OP(cvtepi32_ps)(CONVNEUR_OP(shuffle_epi8)(bytes, pixel));
                sum = CONVNEUR_OP(add_ps)(sum, CONVNEUR_OP(mul_ps)(values, CONVNEUR_OP(loadu_ps)(weights)));
            }
        }
        CONVNEUR_OP(storeu_ps)(&made_[4 * i + 4 * kLanes * r], sum);
    }
#endif

    int count_, quads_, at_ = -1;
    ReadableRows rows_;
    std::vector<int> starts_;
    std::vector<float> weights_, made_;
};

void make_means(const Resize& r, Box needed, const Axis& down_axis, const Axis& across_axis, const uint8_t* pixels,
                ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    Weights across, down;
    fill_means(across_axis, r.window.left, r.window.width, r.hflip, needed.left, across);
    fill_means(down_axis, r.window.top, r.window.height, false, needed.top, down);
    MeanRows means(across, pixels, stride, needed);
    const int values = means.values();
    std::vector<float> sums(values);
    std::vector<uint8_t> bytes(values);
    for (int y = 0; y < r.window.height; y++) {
        const float* weights = &down.weights[static_cast<size_t>(y) * down.taps];
        for (int k = 0; k < std::min(down.taps, needed.height - down.starts[y]); k++) {
            const float weight = weights[k];
            if (k > 0 && weight == 0.f) break;
            const float* row = means.row(down.starts[y] + k);
            if (k == 0)
                for (int x = 0; x < values; x++) sums[x] = weight * row[x];
            else
                for (int x = 0; x < values; x++) sums[x] += weight * row[x];
        }
        for (int x = 0; x < values; x++) bytes[x] = to_byte(sums[x]);
        write_pixels(bytes.data(), r.window.width, out + (r.vflip ? r.window.height - 1 - y : y) * out_stride);
    }
}

constexpr int kPoint = 11;  // bits behind the point of a weight in OpenCV's interpolation

int16_t to_fixed(float weight) { return static_cast<int16_t>(std::nearbyint(weight * (1 << kPoint))); }

// Rows interpolated between two pixels: of each output red, green, blue and 0, without the last four bits.
class PairRows {
public:
    PairRows(const Resize& r, const Axis& axis, const uint8_t* pixels, ptrdiff_t stride, Box needed)
        : count_(r.window.width), rows_(pixels, stride, needed.height, needed.width, 1), starts_(values() / 4),
          weights_(2 * static_cast<size_t>(values())) {
        for (int i = 0; i < values() / 4; i++) {
            const int column = std::min(i, count_ - 1);
            float second;
            int start = axis.pair(r.window.left + (r.hflip ? count_ - 1 - column : column), second);
            if (start >= axis.size - 1) start = axis.size - 1, second = 0.f;
            const int16_t pair[2] = {to_fixed(1.f - second), to_fixed(second)};
            starts_[i] = 3 * (start - needed.left);
            for (int c = 0; c < 4; c++) std::memcpy(&weights_[8 * static_cast<size_t>(i) + 2 * c], pair, sizeof pair);
        }
        for (auto& row : made_) row.resize(values());
    }

    int values() const { return (count_ + 3) / 4 * 16; }

    // The interpolated row `y`; the last two asked for are kept.
    const int16_t* row(int y) {
        for (int i = 0; i < 2; i++)
            if (at_[i] == y) return made_[latest_ = i].data();
        latest_ = 1 - latest_;
        make(rows_.row(y), made_[latest_].data());
        at_[latest_] = y;
        return made_[latest_].data();
    }

private:
    void make(const uint8_t* row, int16_t* to) const {
        const int16_t* pairs = weights_.data();
#if defined(CONVNEUR_VECTORS)
        const Register by_color = every_lane(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
        for (int i = 0; i < values() / 4; i += kGroup, pairs += 8 * kGroup) {
            Register sums[kRegisters];
            for (int r = 0; r < kRegisters; r++) {
                const Register bytes = load_outputs(row, &starts_[i + r * kLanes]);
                const Register products = CONVNEUR_OP(madd_epi16)(CONVNEUR_OP(shuffle_epi8)(bytes, by_color),
                                                                  load(pairs + 8 * kLanes * r));
                sums[r] = CONVNEUR_OP(srai_epi32)(products, 4);
            }
            store_halves(sums, to + 4 * i);
        }
#else
        for (int i = 0; i < values() / 4; i++, pairs += 8)
            for (int c = 0; c < 3; c++) {
                const uint8_t* from = row + starts_[i] + c;
                to[4 * i + c] = static_cast<int16_t>((from[0] * pairs[0] + from[3] * pairs[1]) >> 4);
            }
#endif
    }

    int count_, latest_ = 0, at_[2] = {-1, -1};
    ReadableRows rows_;
    std::vector<int> starts_;
    std::vector<int16_t> weights_, made_[2];
};

void make_pairs(const Resize& r, Box needed, const Axis& down, const Axis& across, const uint8_t* pixels,
                ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    PairRows rows(r, across, pixels, stride, needed);
    const int values = rows.values();
    std::vector<uint8_t> bytes(values);
    for (int y = 0; y < r.window.height; y++) {
        float second;
        const int start = down.pair(r.window.top + y, second);
        const int16_t* above = rows.row(std::min(start, down.size - 1) - needed.top);
        const int16_t* below = rows.row(std::min(start + 1, down.size - 1) - needed.top);
        const int16_t first_weight = to_fixed(1.f - second), second_weight = to_fixed(second);
        for (int x = 0; x < values; x++) {
            const int sum = ((first_weight * above[x]) >> 16) + ((second_weight * below[x]) >> 16);
            bytes[x] = static_cast<uint8_t>((sum + 2) >> 2);
        }
        write_pixels(bytes.data(), r.window.width, out + (r.vflip ? r.window.height - 1 - y : y) * out_stride);
    }
}

void copy(const Resize& r, const uint8_t* pixels, ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    for (int y = 0; y < r.window.height; y++) {
        const uint8_t* from = pixels + (r.vflip ? r.window.height - 1 - y : y) * stride;
        for (int x = 0; x < r.window.width; x++)
            std::memcpy(out + y * out_stride + 3 * (r.hflip ? r.window.width - 1 - x : x), from + 3 * x, 3);
    }
}

}  // namespace

Box area_support(const Resize& r) {
    const Axis down(r.height, r.out_height), across(r.width, r.out_width);
    const Kind kind = kind_of(down, across);
    const Span rows = span(down, kind, r.window.top, r.window.height);
    const Span columns = span(across, kind, r.window.left, r.window.width);
    return {rows.begin, columns.begin, rows.length, columns.length};
}

void make_area(const Resize& r, Box needed, const uint8_t* pixels, ptrdiff_t stride, uint8_t* out,
               ptrdiff_t out_stride) {
    const Axis down(r.height, r.out_height), across(r.width, r.out_width);
    switch (kind_of(down, across)) {
        case Kind::kCopy: return copy(r, pixels, stride, out, out_stride);
        case Kind::kWhole:
            return make_whole(r, r.height / r.out_height, r.width / r.out_width, pixels, stride, out, out_stride);
        case Kind::kMeans: return make_means(r, needed, down, across, pixels, stride, out, out_stride);
        case Kind::kPairs: return make_pairs(r, needed, down, across, pixels, stride, out, out_stride);
    }
}

}  // namespace convneur
