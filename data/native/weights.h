// The weights of Pillow's antialiased resize along one axis.
#pragma once

#include <cstdint>
#include <vector>

namespace convneur {

constexpr int kPrecision = 32 - 8 - 2;  // bits of a weight behind the point, as Pillow has them

enum Filter { kBilinear = 0, kBicubic = 1, kArea = 2 };

// For some of the outputs along an axis, the inputs that each is made of: `weights[i * taps]` and on are those of
// `starts[i]` and on, `counts[i]` of them, then zeros.
struct AxisWeights {
    int taps = 0;
    std::vector<int> starts, counts;
    std::vector<int32_t> weights;
    bool narrow = true;  // whether every weight's absolute value is below 2^23 - 2^16, as the vectors need
};

// The weights of outputs first ... first + count - 1 of `out_size`, of `in_size` inputs.
void make_weights(int in_size, int out_size, Filter filter, int first, int count, AxisWeights& made);

// The inputs of those outputs: from `begin` to before `end`.
void support_of(int in_size, int out_size, Filter filter, int first, int count, int& begin, int& end);

}  // namespace convneur
