#include "weights.h"

#include <algorithm>
#include <cmath>

namespace convneur {
namespace {

double bilinear(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

struct Axis {
    double scale, stretch, support;
    int size;

    Axis(int in_size, int out_size, Filter filter) : size(in_size) {
        // Pillow takes the input's size as a float: beyond 2^24 pixels that would tell.
        scale = static_cast<double>(static_cast<float>(in_size)) / out_size;
        stretch = std::max(scale, 1.0);
        support = (filter == kBicubic ? 2.0 : 1.0) * stretch;
    }
    double center(int out) const { return (out + 0.5) * scale; }
    int begin(int out) const { return std::max(static_cast<int>(center(out) - support + 0.5), 0); }
    int end(int out) const { return std::min(static_cast<int>(center(out) + support + 0.5), size); }
};

template <double (*filter)(double)>
void fill(const Axis& axis, int first, int count, AxisWeights& made) {
    const double inverse = 1.0 / axis.stretch;
    std::vector<double> exact(made.taps);
    for (int i = 0; i < count; i++) {
        const double center = axis.center(first + i);
        const int start = axis.begin(first + i), taps = axis.end(first + i) - start;
        double sum = 0.0;
        for (int k = 0; k < taps; k++) {
            exact[k] = filter((k + start - center + 0.5) * inverse);
            sum += exact[k];
        }
        int32_t* weights = &made.weights[static_cast<size_t>(i) * made.taps];
        for (int k = 0; k < taps; k++) {
            const double weight = sum != 0.0 ? exact[k] / sum : exact[k];
            weights[k] = static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kPrecision));
            made.narrow &= std::abs(weights[k]) < (1 << 23) - (1 << 16);
        }
        made.starts[i] = start;
        made.counts[i] = taps;
    }
}

}  // namespace

void support_of(int in_size, int out_size, Filter filter, int first, int count, int& begin, int& end) {
    const Axis axis(in_size, out_size, filter);
    begin = axis.begin(first);
    end = axis.end(first + count - 1);
}

void make_weights(int in_size, int out_size, Filter filter, int first, int count, AxisWeights& made) {
    const Axis axis(in_size, out_size, filter);
    made.taps = 1;
    for (int i = first; i < first + count; i++) made.taps = std::max(made.taps, axis.end(i) - axis.begin(i));
    made.narrow = true;
    made.starts.resize(count);
    made.counts.resize(count);
    made.weights.assign(static_cast<size_t>(count) * made.taps, 0);
    (filter == kBicubic ? fill<bicubic> : fill<bilinear>)(axis, first, count, made);
}

}  // namespace convneur
