#include "affine.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "padded.h"
#include "vectors.h"

#define INLINE __attribute__((always_inline)) inline

namespace convneur {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define CONVNEUR_PAIRS 1
constexpr int kPixels = 2;  // at a time, in a register of their reds, greens, blues and fourths as doubles
#else
constexpr int kPixels = 1;
#endif

typedef int32_t Ints __attribute__((vector_size(16 * kPixels)));

#if defined(CONVNEUR_PAIRS) || defined(__AVX2__)
typedef double Doubles __attribute__((vector_size(32 * kPixels)));
#else
struct Doubles {
    double values[4];
};
inline Doubles operator+(Doubles a, Doubles b) {
    for (int i = 0; i < 4; i++) a.values[i] += b.values[i];
    return a;
}
inline Doubles operator-(Doubles a, Doubles b) {
    for (int i = 0; i < 4; i++) a.values[i] -= b.values[i];
    return a;
}
inline Doubles operator*(Doubles a, Doubles b) {
    for (int i = 0; i < 4; i++) a.values[i] *= b.values[i];
    return a;
}
inline Doubles operator*(double a, Doubles b) { return Doubles{{a, a, a, a}} * b; }
inline Doubles operator-(Doubles a) {
    for (double& value : a.values) value = -value;
    return a;
}
#endif

constexpr int kEdge = 2;  // pixels by which the first and the last of a row are repeated, beyond what is interpolated

constexpr int64_t kOutside = INT64_MIN;

// A copy of the picture with repeated edges, and the fill colour as if it were pixels.
class Source {
public:
    Source(const Picture& picture, const uint8_t* fill) {
        const int width = picture.width, height = picture.height;
        const size_t stride = 3 * (static_cast<size_t>(width) + 2 * kEdge);
        pixels_.resize(stride * height + 16);
        rows_.resize(height + 2 * kEdge);
        for (int y = 0; y < height; y++) {
            uint8_t* row = &pixels_[y * stride];
            const uint8_t* from = picture.row(y);
            std::memcpy(row + 3 * kEdge, from, 3 * static_cast<size_t>(width));
            for (int x = 0; x < kEdge; x++) {
                std::memcpy(row + 3 * x, from, 3);
                std::memcpy(row + 3 * (kEdge + width + x), from + 3 * (width - 1), 3);
            }
        }
        for (int y = -kEdge; y < height + kEdge; y++)
            rows_[y + kEdge] = &pixels_[std::clamp(y, 0, height - 1) * stride + 3 * kEdge];
        for (int i = 0; i < 16; i++) fill_[i] = fill[i % 3];
        std::fill_n(fill_rows_, 4, fill_);
    }

    // Rows from `y` on: their first pixels' bytes, and those of the edges before them.
    const uint8_t* const* rows(int64_t y) const { return &rows_[y + kEdge]; }

    // Rows of the fill colour.
    const uint8_t* const* fill_rows() const { return fill_rows_; }

private:
    std::vector<uint8_t> pixels_;
    std::vector<const uint8_t*> rows_;
    uint8_t fill_[16];
    const uint8_t* fill_rows_[4];
};

// Where a row's outputs are taken from, along an axis.
struct Places {
    std::vector<int64_t> firsts;    // the pixel before each, or kOutside
    std::vector<double> distances;  // from that one's middle

    explicit Places(size_t count) : firsts(count, kOutside), distances(count) {}
};

#if defined(__AVX512F__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif

typedef double Exacts __attribute__((vector_size(8 * kWide)));
typedef int64_t Wholes __attribute__((vector_size(8 * kWide)));

// Finds outputs' places, slope x (x + 0.5) + offset + shift, on an axis of `size` pixels; and some more, up to a
// multiple of kWide.
void locate(double slope, double offset, double shift, int size, int count, Places& places) {
    // Added to a number, it leaves the nearest whole one in the last bits.
    constexpr double kWhole = 6755399441055744.0;  // 1.5 x 2^52
    const Exacts none{};
    Exacts middles{};
    for (int i = 0; i < kWide; i++) middles[i] = i + 0.5;
    for (int x = 0; x < count; x += kWide) {
        const Exacts exact = slope * (middles + x) + offset + shift;
        const Wholes is_inside = (exact >= none) & (exact < none + size);
        const Exacts at = is_inside ? exact - 0.5 : none;
        Exacts first = (at + kWhole) - kWhole;
        first = first > at ? first - 1.0 : first;
        const Exacts distance = at - first, marked = first + kWhole, origin = none + kWhole;
        Wholes bits, origin_bits;
        std::memcpy(&bits, &marked, sizeof bits);
        std::memcpy(&origin_bits, &origin, sizeof bits);
        const Wholes firsts = is_inside ? bits - origin_bits : Wholes{} + kOutside;
        std::memcpy(&places.distances[x], &distance, sizeof distance);
        std::memcpy(&places.firsts[x], &firsts, sizeof firsts);
    }
}

// Four bytes of each colour, side by side or below each other.
enum class Way { kAcross, kDown };

// The coefficients of what is interpolated, as whole numbers: a + d (b + d (c + d e)), or a + d b.
struct Coefficients {
    Ints a, b, c, e;
};

#if defined(CONVNEUR_VECTORS)

#if defined(CONVNEUR_PAIRS)
INLINE Ints products(__m256i bytes, int32_t weights) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm256_dpbusd_epi32(_mm256_setzero_si256(), bytes, _mm256_set1_epi32(weights)));
#else
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi32(weights));
    return reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
#else
INLINE Ints products(__m128i bytes, int32_t weights) {
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi32(weights));
    return reinterpret_cast<Ints>(_mm_madd_epi16(pairs, _mm_set1_epi16(1)));
}
#endif

constexpr int32_t weights_of(int a, int b, int c, int d) {
    return static_cast<int32_t>((a & 255u) | (b & 255u) << 8 | (c & 255u) << 16 | (d & 255u) << 24);
}

INLINE __m128i gather(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

INLINE __m128i gather(const uint8_t* const (&from)[2]) {
    int32_t pixels[2];
    for (int k = 0; k < 2; k++) std::memcpy(&pixels[k], from[k], 4);
    return _mm_unpacklo_epi32(_mm_cvtsi32_si128(pixels[0]), _mm_cvtsi32_si128(pixels[1]));
}

INLINE __m128i gather(const uint8_t* const (&from)[4]) {
    int32_t pixels[4];
    for (int k = 0; k < 4; k++) std::memcpy(&pixels[k], from[k], 4);
    return _mm_setr_epi32(pixels[0], pixels[1], pixels[2], pixels[3]);
}

template <bool kCubic, Way way, class From>
INLINE Coefficients coefficients(const From* from) {
    const __m128i order = way == Way::kAcross ? _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1)
                                              : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1);
#if defined(CONVNEUR_PAIRS)
    const __m256i loaded = _mm256_inserti128_si256(_mm256_castsi128_si256(gather(from[0])), gather(from[1]), 1);
    const __m256i bytes = _mm256_shuffle_epi8(loaded, _mm256_broadcastsi128_si256(order));
#else
    const __m128i bytes = _mm_shuffle_epi8(gather(from[0]), order);
#endif
    if (!kCubic)
        return {products(bytes, weights_of(1, 0, 0, 0)), products(bytes, weights_of(-1, 1, 0, 0)), Ints{}, Ints{}};
    return {products(bytes, weights_of(0, 1, 0, 0)), products(bytes, weights_of(-1, 0, 1, 0)),
            products(bytes, weights_of(2, -2, 1, -1)), products(bytes, weights_of(-1, 1, -1, 1))};
}

#else

INLINE int value(const uint8_t* from, int k, int c) { return from[3 * k + c]; }
template <int n>
INLINE int value(const uint8_t* const (&from)[n], int k, int c) {
    return from[k][c];
}

template <bool kCubic, Way, class From>
INLINE Coefficients coefficients(const From* from) {
    Coefficients made{};
    for (int c = 0; c < 3; c++) {
        int v[4];
        for (int k = 0; k < 4; k++) v[k] = kCubic || k < 2 ? value(from[0], k, c) : 0;
        made.a[c] = kCubic ? v[1] : v[0];
        made.b[c] = kCubic ? v[2] - v[0] : v[1] - v[0];
        made.c[c] = 2 * (v[0] - v[1]) + v[2] - v[3];
        made.e[c] = -v[0] + v[1] - v[2] + v[3];
    }
    return made;
}

#endif

#if defined(CONVNEUR_PAIRS)
INLINE Doubles exact(Ints values) { return _mm512_cvtepi32_pd(reinterpret_cast<__m256i>(values)); }
INLINE Doubles spread(const double* distances) {
    return _mm512_permutexvar_pd(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1),
                                 _mm512_castpd128_pd512(_mm_loadu_pd(distances)));
}
// Writes pixels of four bytes.
INLINE void write(Doubles values, uint8_t* out) {
    const __m512d clipped = _mm512_min_pd(_mm512_max_pd(values, _mm512_setzero_pd()), _mm512_set1_pd(255.0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_cvtepi32_epi8(_mm512_cvttpd_epi32(clipped)));
}
#elif defined(__AVX2__)
INLINE Doubles exact(Ints values) { return _mm256_cvtepi32_pd(reinterpret_cast<__m128i>(values)); }
INLINE Doubles spread(const double* distances) { return _mm256_set1_pd(distances[0]); }
INLINE void write(Doubles values, uint8_t* out) {
    const __m256d clipped = _mm256_min_pd(_mm256_max_pd(values, _mm256_setzero_pd()), _mm256_set1_pd(255.0));
    const __m128i low = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const int bytes = _mm_cvtsi128_si32(_mm_shuffle_epi8(_mm256_cvttpd_epi32(clipped), low));
    std::memcpy(out, &bytes, 4);
}
#else
INLINE Doubles exact(Ints values) {
    return {{double(values[0]), double(values[1]), double(values[2]), double(values[3])}};
}
INLINE Doubles spread(const double* distances) {
    return {{distances[0], distances[0], distances[0], distances[0]}};
}
INLINE void write(Doubles values, uint8_t* out) {
    for (int i = 0; i < 4; i++) out[i] = static_cast<uint8_t>(std::min(std::max(values.values[i], 0.0), 255.0));
}
#endif

template <bool kCubic, Way way, class From>
INLINE Doubles along(const From* from, Doubles distance) {
    const Coefficients k = coefficients<kCubic, way>(from);
    if (!kCubic) return exact(k.a) + exact(k.b) * distance;
    return exact(k.a) + distance * (exact(k.b) + distance * (exact(k.c) + distance * exact(k.e)));
}

// Interpolates a row of outputs across, down, or across and then down the results.
struct Row {
    const Source& source;
    Places across, down;
    int y, width;
    std::vector<uint8_t> made;  // pixels of four bytes
};

template <bool kCubic>
void row_across(Row& row) {
    for (int x = 0; x < row.width; x += kPixels) {
        const uint8_t* from[kPixels];
        for (int i = 0; i < kPixels; i++) {
            const int64_t left = row.across.firsts[x + i];
            from[i] = left == kOutside ? row.source.fill_rows()[0] : row.source.rows(row.y)[0] + 3 * (left - kCubic);
        }
        write(along<kCubic, Way::kAcross>(from, spread(&row.across.distances[x])), &row.made[4 * x]);
    }
}

template <bool kCubic>
void row_down(Row& row) {
    for (int x = 0; x < row.width; x += kPixels) {
        const uint8_t* from[kPixels][kCubic ? 4 : 2];
        for (int i = 0; i < kPixels; i++) {
            const int64_t top = row.down.firsts[x + i], column = top == kOutside ? 0 : 3 * (x + i);
            const uint8_t* const* rows = top == kOutside ? row.source.fill_rows() : row.source.rows(top - kCubic);
            for (int k = 0; k < (kCubic ? 4 : 2); k++) from[i][k] = rows[k] + column;
        }
        write(along<kCubic, Way::kDown>(from, spread(&row.down.distances[x])), &row.made[4 * x]);
    }
}

template <bool kCubic>
void row_both(Row& row) {
    for (int x = 0; x < row.width; x += kPixels) {
        const Doubles d = spread(&row.down.distances[x]), distance = spread(&row.across.distances[x]);
        const uint8_t* const* rows[kPixels];
        int64_t columns[kPixels];
        for (int i = 0; i < kPixels; i++) {
            const int64_t left = row.across.firsts[x + i], top = row.down.firsts[x + i];
            const bool is_fill = (left == kOutside) | (top == kOutside);
            rows[i] = is_fill ? row.source.fill_rows() : row.source.rows(top - kCubic);
            columns[i] = is_fill ? 0 : 3 * (left - kCubic);
        }
        Doubles v[4];
        for (int k = 0; k < (kCubic ? 4 : 2); k++) {
            const uint8_t* from[kPixels];
            for (int i = 0; i < kPixels; i++) from[i] = rows[i][k] + columns[i];
            v[k] = along<kCubic, Way::kAcross>(from, distance);
        }
        if (!kCubic) {
            write(v[0] + (v[1] - v[0]) * d, &row.made[4 * x]);
            continue;
        }
        const Doubles p2 = -v[0] + v[2], p3 = 2 * (v[0] - v[1]) + v[2] - v[3], p4 = -v[0] + v[1] - v[2] + v[3];
        write(v[1] + d * (p2 + d * (p3 + d * p4)), &row.made[4 * x]);
    }
}

void turn_by_90(const Picture& picture, bool is_back) {
    const int side = picture.width;
    const std::vector<uint8_t> from(picture.pixels, picture.pixels + picture.bytes());
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++) {
            const int64_t row = is_back ? side - 1 - x : x, column = is_back ? y : side - 1 - y;
            std::memcpy(picture.row(y) + 3 * x, &from[3 * (row * side + column)], 3);
        }
}

void turn_by_180(const Picture& picture) {
    uint8_t *first = picture.pixels, *last = picture.pixels + picture.bytes() - 3;
    for (; first < last; first += 3, last -= 3) std::swap_ranges(first, first + 3, last);
}

}  // namespace

void transform(const Picture& picture, const Matrix& m, bool is_cubic, const uint8_t* fill) {
    const Source source(picture, fill);
    const size_t room = picture.width + kWide;
    Row row{source, Places(room), Places(room), 0, picture.width, std::vector<uint8_t>(4 * room)};
    // Where the other way's distances are all 0, its polynomial gives the middle sample, to the bit.
    const bool is_across = m.d == 0 && m.e == 1 && m.f == 0, is_down = m.a == 1 && m.b == 0 && m.c == 0;
    const auto make = is_across ? (is_cubic ? row_across<true> : row_across<false>)
                      : is_down ? (is_cubic ? row_down<true> : row_down<false>)
                                : (is_cubic ? row_both<true> : row_both<false>);
    for (row.y = 0; row.y < picture.height; row.y++) {
        const double middle = row.y + 0.5;
        if (is_across || !is_down) locate(m.a, m.b * middle, m.c, picture.width, picture.width, row.across);
        if (!is_across) locate(m.d, m.e * middle, m.f, picture.height, picture.width, row.down);
        make(row);
        write_pixels(row.made.data(), picture.width, picture.row(row.y));
    }
}

void rotate(const Picture& picture, double degrees, double cosine, double sine, bool is_cubic, const uint8_t* fill) {
    if (degrees == 0) return;
    if (degrees == 180) return turn_by_180(picture);
    if ((degrees == 90 || degrees == 270) && picture.width == picture.height)
        return turn_by_90(picture, degrees == 270);
    const double x = picture.width / 2.0, y = picture.height / 2.0;
    Matrix m{cosine, sine, 0.0, -sine, cosine, 0.0};
    m.c = m.a * -x + m.b * -y + 0.0;
    m.f = m.d * -x + m.e * -y + 0.0;
    m.c += x;
    m.f += y;
    transform(picture, m, is_cubic, fill);
}

}  // namespace convneur
