#include "affine.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "padded.h"
#include "vectors.h"

// Where there are no registers of their size, nothing of theirs may be passed from function to function.
#define INLINE __attribute__((always_inline)) inline

namespace convneur {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int kPixels = 2;  // at a time, in a register of their reds, greens, blues and fourths as doubles
#else
constexpr int kPixels = 1;
#endif

typedef double Doubles __attribute__((vector_size(32 * kPixels)));
typedef int32_t Ints __attribute__((vector_size(16 * kPixels)));

constexpr int kEdge = 2;  // pixels by which the first and the last of a row are repeated, beyond what is interpolated

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
            rows_[y + kEdge] = &pixels_[std::clamp(y, 0, height - 1) * stride];
        for (int i = 0; i < 16; i++) across_[i] = fill[i % 3], down_[i] = fill[i % 4 % 3];
    }

    // Pixel (x, y) and those to its right.
    const uint8_t* at(int x, int y) const { return rows_[y + kEdge] + 3 * (static_cast<ptrdiff_t>(x) + kEdge); }

    const uint8_t* fill_across() const { return across_; }
    const uint8_t* fill_down() const { return down_; }

private:
    std::vector<uint8_t> pixels_;
    std::vector<const uint8_t*> rows_;
    uint8_t across_[16], down_[16];
};

// Where a row's outputs are taken from.
struct Places {
    std::vector<int32_t> xs, ys;      // the pixel to the upper left of each, or kOutside
    std::vector<double> across, down;  // how far from there
};

constexpr int kOutside = INT32_MIN;

void locate(const Matrix& m, int y, const Picture& picture, Places& places) {
    const double row = y + 0.5, b = m.b * row, e = m.e * row;
    for (int x = 0; x < picture.width; x++) {
        const double column = x + 0.5;
        double u = m.a * column + b + m.c, v = m.d * column + e + m.f;
        const bool is_inside = u >= 0.0 && u < picture.width && v >= 0.0 && v < picture.height;
        u = is_inside ? u - 0.5 : 0.0;
        v = is_inside ? v - 0.5 : 0.0;
        const int left = static_cast<int>(u) - (u < 0.0), top = static_cast<int>(v) - (v < 0.0);
        places.xs[x] = is_inside ? left : kOutside;
        places.ys[x] = top;
        places.across[x] = u - left;
        places.down[x] = v - top;
    }
}

// Four bytes of each colour, side by side or below each other.
enum class Way { kAcross, kDown };

// The coefficients of what is interpolated, as whole numbers: a + d (b + d (c + d e)), or a + d b.
struct Coefficients {
    Ints a, b, c, e;
};

#if defined(CONVNEUR_VECTORS)

#if defined(__AVX512BW__) && defined(__AVX512VL__)
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

template <bool kCubic, Way way>
INLINE Coefficients coefficients(const uint8_t* const* from) {
    const __m128i order = way == Way::kAcross ? _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1)
                                              : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i loaded = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[0]))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[1])), 1);
    const __m256i bytes = _mm256_shuffle_epi8(loaded, _mm256_broadcastsi128_si256(order));
#else
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[0])), order);
#endif
    if (!kCubic)
        return {products(bytes, weights_of(1, 0, 0, 0)), products(bytes, weights_of(-1, 1, 0, 0)), Ints{}, Ints{}};
    return {products(bytes, weights_of(0, 1, 0, 0)), products(bytes, weights_of(-1, 0, 1, 0)),
            products(bytes, weights_of(2, -2, 1, -1)), products(bytes, weights_of(-1, 1, -1, 1))};
}

#else

template <bool kCubic, Way way>
INLINE Coefficients coefficients(const uint8_t* const* from) {
    Coefficients made{};
    for (int c = 0; c < 3; c++) {
        int v[4];
        for (int k = 0; k < 4; k++) v[k] = from[0][(way == Way::kAcross ? 3 : 4) * k + c];
        made.a[c] = kCubic ? v[1] : v[0];
        made.b[c] = kCubic ? v[2] - v[0] : v[1] - v[0];
        made.c[c] = 2 * (v[0] - v[1]) + v[2] - v[3];
        made.e[c] = -v[0] + v[1] - v[2] + v[3];
    }
    return made;
}

#endif

INLINE Doubles exact(Ints values) { return __builtin_convertvector(values, Doubles); }

template <bool kCubic, Way way>
INLINE Doubles along(const uint8_t* const* from, Doubles distance) {
    const Coefficients k = coefficients<kCubic, way>(from);
    if (!kCubic) return exact(k.a) + exact(k.b) * distance;
    return exact(k.a) + distance * (exact(k.b) + distance * (exact(k.c) + distance * exact(k.e)));
}

INLINE Doubles spread(const double* distances) {
    if (kPixels == 1) return Doubles{} + distances[0];
    Doubles made{};
    for (int i = 0; i < 4 * kPixels; i++) made[i] = distances[i / 4];
    return made;
}

// Writes pixels of four bytes.
INLINE void write(Doubles values, uint8_t* out) {
    const Doubles none{}, most = none + 255.0;
    values = values > none ? values : none;
    values = values < most ? values : most;
    const Ints whole = __builtin_convertvector(values, Ints);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_cvtepi32_epi8(reinterpret_cast<__m256i>(whole)));
#else
    for (int i = 0; i < 4; i++) out[i] = static_cast<uint8_t>(whole[i]);
#endif
}

template <bool kCubic>
void row_across(const Source& source, const Places& places, int y, int width, uint8_t* out) {
    for (int x = 0; x < width; x += kPixels) {
        const uint8_t* from[kPixels];
        for (int i = 0; i < kPixels; i++) {
            const int left = places.xs[x + i];
            from[i] = left == kOutside ? source.fill_across() : source.at(left - kCubic, y);
        }
        write(along<kCubic, Way::kAcross>(from, spread(&places.across[x])), out + 4 * x);
    }
}

template <bool kCubic>
void row_down(const Source& source, const Places& places, int, int width, uint8_t* out) {
    for (int x = 0; x < width; x += kPixels) {
        const uint8_t* from[kPixels];
        uint8_t columns[kPixels][16] = {};
        for (int i = 0; i < kPixels; i++) {
            from[i] = source.fill_down();
            if (places.xs[x + i] == kOutside) continue;
            for (int k = 0; k < (kCubic ? 4 : 2); k++)
                std::memcpy(columns[i] + 4 * k, source.at(x + i, places.ys[x + i] - kCubic + k), 4);
            from[i] = columns[i];
        }
        write(along<kCubic, Way::kDown>(from, spread(&places.down[x])), out + 4 * x);
    }
}

template <bool kCubic>
void row_both(const Source& source, const Places& places, int, int width, uint8_t* out) {
    for (int x = 0; x < width; x += kPixels) {
        const Doubles d = spread(&places.down[x]), distance = spread(&places.across[x]);
        Doubles v[4];
        for (int k = 0; k < (kCubic ? 4 : 2); k++) {
            const uint8_t* from[kPixels];
            for (int i = 0; i < kPixels; i++) {
                const int left = places.xs[x + i];
                from[i] = left == kOutside ? source.fill_across() : source.at(left - kCubic, places.ys[x + i] - kCubic + k);
            }
            v[k] = along<kCubic, Way::kAcross>(from, distance);
        }
        if (!kCubic) {
            write(v[0] + (v[1] - v[0]) * d, out + 4 * x);
            continue;
        }
        const Doubles p2 = -v[0] + v[2], p3 = 2 * (v[0] - v[1]) + v[2] - v[3], p4 = -v[0] + v[1] - v[2] + v[3];
        write(v[1] + d * (p2 + d * (p3 + d * p4)), out + 4 * x);
    }
}

using MakeRow = void (*)(const Source&, const Places&, int, int, uint8_t*);

// Where the other way's distances are all 0, its polynomial gives the middle sample, to the bit.
template <bool kCubic>
MakeRow row_maker(const Matrix& m) {
    if (m.d == 0 && m.e == 1 && m.f == 0) return row_across<kCubic>;
    if (m.a == 1 && m.b == 0 && m.c == 0) return row_down<kCubic>;
    return row_both<kCubic>;
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

void transform(const Picture& picture, const Matrix& matrix, bool is_cubic, const uint8_t* fill) {
    const Source source(picture, fill);
    const size_t room = picture.width + kPixels;
    Places places{std::vector<int32_t>(room, kOutside), std::vector<int32_t>(room), std::vector<double>(room),
                  std::vector<double>(room)};
    std::vector<uint8_t> made(4 * room);
    const MakeRow make_row = is_cubic ? row_maker<true>(matrix) : row_maker<false>(matrix);
    for (int y = 0; y < picture.height; y++) {
        locate(matrix, y, picture, places);
        make_row(source, places, y, picture.width, made.data());
        write_pixels(made.data(), picture.width, picture.row(y));
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
