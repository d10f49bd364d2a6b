// Vectors, products of small matrices, GELU and working memory: what the kernels of this folder are made of.
//
// Rows of matrices are padded with zeros to whole vectors.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

namespace convneur {

// Rows and vectors of the block of a product that stays in registers: 32 of 64 bytes, 16 of 32, or 32 of 16.
#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 8, COLUMNS = 3;
#elif defined(__AVX__)
constexpr int BYTES = 32, ROWS = 4, COLUMNS = 3;
#else
constexpr int BYTES = 16, ROWS = 8, COLUMNS = 3;
#endif

constexpr double NORM_EPS = 1e-12;  // of the memory's queries and keys, as in eager.py

template <typename T> struct Simd;
template <> struct Simd<float> {
    typedef float Vector __attribute__((vector_size(BYTES)));
    typedef float Unaligned __attribute__((vector_size(BYTES), aligned(4), may_alias));
};
template <> struct Simd<double> {
    typedef double Vector __attribute__((vector_size(BYTES)));
    typedef double Unaligned __attribute__((vector_size(BYTES), aligned(8), may_alias));
};
template <typename T> using Vector = typename Simd<T>::Vector;
template <typename T> constexpr int64_t LANES = BYTES / sizeof(T);

template <typename T> inline Vector<T> load(const T* p) { return *(const typename Simd<T>::Unaligned*)p; }
template <typename T> inline void store(T* p, Vector<T> x) { *(typename Simd<T>::Unaligned*)p = x; }
template <typename T> int64_t whole_vectors(int64_t n) { return (n + LANES<T> - 1) / LANES<T> * LANES<T>; }
// Length of a row of n numbers: whole vectors, but no multiple of `bad` bytes, at which rows compete for few cache sets.
template <typename T> int64_t padded(int64_t n, int64_t bad) {
    const int64_t whole = whole_vectors<T>(n);
    return whole * sizeof(T) % bad ? whole : whole + LANES<T>;
}

// ---- Products --------------------------------------------------------------------------------------------------

// A matrix operand of which single numbers are read: element (i, p) is at i * row + p * column.
template <typename T> struct Operand {
    const T* data;
    int64_t row, column;
};

template <typename T, int R, int C>
void block(Operand<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t inner, bool accumulate) {
    Vector<T> sums[R][C];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) sums[i][j] = accumulate ? load(c + i * c_row + j * LANES<T>) : Vector<T>{};
    for (int64_t p = 0; p < inner; p++) {
        Vector<T> row[C];
        for (int j = 0; j < C; j++) row[j] = load(b + p * b_row + j * LANES<T>);
        for (int i = 0; i < R; i++) {
            const T factor = a.data[i * a.row + p * a.column];
            for (int j = 0; j < C; j++) sums[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) store(c + i * c_row + j * LANES<T>, sums[i][j]);
}

template <typename T, int R, int C>
void blocks(int64_t rows, int64_t columns, Operand<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t inner,
            bool accumulate) {
    if constexpr (R > 0 && C > 0) {
        if (rows < R) return blocks<T, R - 1, C>(rows, columns, a, b, b_row, c, c_row, inner, accumulate);
        if (columns < C) return blocks<T, R, C - 1>(rows, columns, a, b, b_row, c, c_row, inner, accumulate);
        block<T, R, C>(a, b, b_row, c, c_row, inner, accumulate);
    }
}

enum Mode { SET, ADD };

// C (rows, columns) = or += A (rows, inner) B (inner, columns). Columns are padded, their number a multiple of a vector.
template <typename T>
void product(int64_t rows, int64_t columns, int64_t inner, Operand<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
             Mode mode = SET) {
    const int64_t vectors = columns / LANES<T>;
    for (int64_t j = 0, width; j < vectors; j += width) {
        width = std::min<int64_t>(vectors - j, COLUMNS);
        if (width > 1 && (vectors - j) % COLUMNS == 1) width--;  // or a single vector would be left, too few sums at once
        for (int64_t i = 0; i < rows; i += ROWS)
            blocks<T, ROWS, COLUMNS>(rows - i, width, {a.data + i * a.row, a.row, a.column}, b + j * LANES<T>, b_row,
                                     c + i * c_row + j * LANES<T>, c_row, inner, mode == ADD);
    }
}

// ---- GELU and sigmoid ------------------------------------------------------------------------------------------

template <typename T> struct Gelu {
    Vector<T> value, slope, curvature;  // the function, its first and its second derivative
};

// 2^y / sqrt(2 pi), |y| <= 124
inline Vector<float> scaled_power(Vector<float> y) {
    typedef int32_t Integers __attribute__((vector_size(BYTES)));
    // 2^y = 2^n 2^f, |f| <= 1/2: adding 1.5 * 2^23 rounds y to n, and leaves it in the lowest bits. The polynomial in f is
    // minimax, of relative error 8e-8.
    const Vector<float> shifted = y + 12582912.0f, f = y - (shifted - 12582912.0f);
    Vector<float> e = Vector<float>{} + 0.000529654596f;
    e = e * f + 0.00385998252f;
    e = e * f + 0.0221441421f;
    e = e * f + 0.0958343922f;
    e = e * f + 0.276525632f;
    e = e * f + 0.398942309f;
    return (Vector<float>)((Integers)e + ((Integers)shifted << 23));
}

// s = |x|, the upper tail of the normal distribution at s, and its density, on which it rests.
inline void tail(Vector<float> x, Vector<float>& s, Vector<float>& probability, Vector<float>& density) {
    typedef int32_t Integers __attribute__((vector_size(BYTES)));
    const Integers farthest = (Integers)(Vector<float>{} + 12.6f);  // beyond it the density is no normal number
    const Integers magnitude = (Integers)x & 0x7fffffff;
    s = (Vector<float>)(magnitude < farthest ? magnitude : farthest);
    density = scaled_power(s * s * -0.72134752f);
    // Minimax in t for the ratio of tail and density, of relative error 2e-7
    const Vector<float> t = 1.0f / (1.0f + 0.31f * s);
    Vector<float> p = Vector<float>{} + 0.0898412672f;
    p = p * t - 0.354947638f;
    p = p * t + 0.388693647f;
    p = p * t - 0.0373540753f;
    p = p * t + 0.276003686f;
    p = p * t + 0.270142462f;
    p = p * t + 0.310973106f;
    p = p * t + 0.309961907f;
    probability = p * t * density;
}

inline void tail(Vector<double> x, Vector<double>& s, Vector<double>& probability, Vector<double>& density) {
    s = x < 0.0 ? -x : x;
    for (int i = 0; i < LANES<double>; i++) {
        probability[i] = 0.5 * std::erfc(s[i] * M_SQRT1_2);
        density[i] = 0.398942280401432678 * std::exp(-0.5 * s[i] * s[i]);
    }
}

template <typename T> inline Gelu<T> gelu(Vector<T> x) {
    Vector<T> s, probability, density;
    tail(x, s, probability, density);
    const Vector<T> zero{}, below = x < zero ? probability : T(1) - probability;
    return {(x < zero ? zero : x) - s * probability, below + x * density, (T(2) - x * x) * density};
}

inline Vector<float> sigmoid(Vector<float> x) {
    const Vector<float> zero{}, largest = zero + 124.0f;
    Vector<float> y = x * -1.44269504f;
    y = y > largest ? largest : y;
    y = y < -largest ? -largest : y;
    const Vector<float> result = 1.0f / (1.0f + 2.50662827f * scaled_power(y));
    return y == y ? result : y;  // the power makes numbers of some NaN
}

// ---- Working memory --------------------------------------------------------------------------------------------

// Hands out arrays, all zero and each at the start of a cache line.
template <typename T> class Arena {
  public:
    explicit Arena(int64_t numbers) : data_((T*)std::aligned_alloc(64, rounded(numbers) * sizeof(T)), std::free) {
        if (data_) std::fill_n(data_.get(), rounded(numbers), T(0));
    }
    static int64_t rounded(int64_t n) { return (n + 15) / 16 * 16; }
    bool failed() const { return !data_; }
    T* take(int64_t numbers) {
        T* result = data_.get() + used_;
        used_ += rounded(numbers);
        return result;
    }

  private:
    std::unique_ptr<T, decltype(&std::free)> data_;
    int64_t used_ = 0;
};

template <typename T> void copy_rows(int64_t rows, int64_t n, const T* from, int64_t from_row, T* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i++) std::copy_n(from + i * from_row, n, to + i * to_row);
}

// Numbers of a's and b's lower halves in turn, or of their upper ones.
template <typename T, bool UPPER, int... I>
inline Vector<T> interleave(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
    constexpr int L = LANES<T>, first = UPPER ? L / 2 : 0;
#ifdef __clang__
    return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * L)...);
#else
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
    typedef Index Indices __attribute__((vector_size(BYTES)));
    return __builtin_shuffle(a, b, Indices{(first + I / 2 + I % 2 * L)...});
#endif
}

template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
    typedef std::make_integer_sequence<int, LANES<T>> Lanes;
    constexpr int64_t L = LANES<T>;
    if (rows < L || columns < L) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++) to[j * to_row + i] = from[i * from_row + j];
        return;
    }
    // Squares of whole vectors, the last of which overlap with those before
    for (int64_t row = 0; row < rows; row += L)
        for (int64_t column = 0; column < columns; column += L) {
            const int64_t i = std::min(row, rows - L), j = std::min(column, columns - L);
            Vector<T> square[L], mixed[L];
#pragma GCC unroll 16
            for (int k = 0; k < L; k++) square[k] = load(from + (i + k) * from_row + j);
#pragma GCC unroll 4
            for (int done = 1; done < L; done *= 2) {
#pragma GCC unroll 8
                for (int k = 0; k < L / 2; k++) {
                    mixed[2 * k] = interleave<T, false>(square[k], square[k + L / 2], Lanes());
                    mixed[2 * k + 1] = interleave<T, true>(square[k], square[k + L / 2], Lanes());
                }
#pragma GCC unroll 16
                for (int k = 0; k < L; k++) square[k] = mixed[k];
            }
#pragma GCC unroll 16
            for (int k = 0; k < L; k++) store(to + (j + k) * to_row + i, square[k]);
        }
}

// The sum of a vector's numbers, halved until few are left.
template <typename T, typename Numbers> T total(Numbers x) {
    constexpr int numbers = sizeof(Numbers) / sizeof(T);
    if constexpr (numbers <= 4) {
        T sum = x[0];
        for (int i = 1; i < numbers; i++) sum += x[i];
        return sum;
    } else {
        typedef T Half __attribute__((vector_size(sizeof(Numbers) / 2)));
        Half low, high;
        std::memcpy(&low, &x, sizeof(Half));
        std::memcpy(&high, (const char*)&x + sizeof(Half), sizeof(Half));
        return total<T, Half>(low + high);
    }
}

template <typename T> T dot(int64_t n, const T* a, const T* b) {
    Vector<T> sums{};
    int64_t i = 0;
    for (; i + LANES<T> <= n; i += LANES<T>) sums += load(a + i) * load(b + i);
    T result = total<T, Vector<T>>(sums);
    for (; i < n; i++) result += a[i] * b[i];
    return result;
}

}  // namespace convneur
