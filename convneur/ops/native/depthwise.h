// A depthwise convolution whose output is never in memory as a whole.
//
// Shape legend: B images of H x W positions, C channels.

#pragma once

#include "vectors.h"

namespace convneur {

constexpr int TAPS = 7, REACH = TAPS / 2;     // of the depthwise convolution, a side
constexpr int OUTPUTS = BYTES == 64 ? 8 : 4;  // side by side, whose sums and inputs stay in registers

// The depthwise convolution of images x (B, H, W, C), by rows as they are asked for.
class Depthwise {
    static constexpr int64_t L = LANES<float>;

  public:
    struct Layer {
        int64_t H, W, C, most;  // `most` tokens are asked for at a time
        const float *x, *weight, *bias;  // weight (C, 1, TAPS, TAPS)

        int64_t groups() const { return (C + L - 1) / L; }
        int64_t width() const { return (W + OUTPUTS - 1) / OUTPUTS * OUTPUTS + TAPS - 1; }
        int64_t row() const { return groups() * width() * L; }
        int64_t numbers() const {
            return groups() * L * (TAPS * TAPS + 1) + TAPS * row() + groups() * L * (2 * W + most + OUTPUTS);
        }
    };

    // Starts at a token of `tokens`; `zeros` has layer.numbers() of them.
    Depthwise(const Layer& layer, int64_t tokens, int64_t first, float* zeros)
        : layer_(layer), tokens_(tokens), row_(first / layer.W), first_(row_ * layer.W), weight_(zeros),
          bias_(weight_ + layer.groups() * L * TAPS * TAPS), held_(bias_ + layer.groups() * L),
          features_(held_ + TAPS * layer.row()) {
        std::fill_n(holds_, TAPS, -1);
        std::copy_n(layer.bias, layer.C, bias_);
        for (int64_t c = 0; c < layer.C; c += L)
            transpose(std::min(L, layer.C - c), TAPS * TAPS, layer.weight + c * TAPS * TAPS, TAPS * TAPS,
                      weight_ + c * TAPS * TAPS, L);
    }

    int64_t stride() const { return layer_.groups() * L; }

    // The features of `count` tokens, `stride()` numbers apart; `token` is never before that of the last call.
    const float* features(int64_t token, int64_t count) {
        const int64_t done = std::min(token - first_, ready_);
        std::copy(features_ + done * stride(), features_ + ready_ * stride(), features_);
        first_ += done, ready_ -= done;
        for (; first_ + ready_ < token + count; ready_ += layer_.W) compute_row();
        return features_ + (token - first_) * stride();
    }

  private:
    // Channels in groups of a vector, and zeros around: (groups, width, L)
    const float* hold(int64_t row) {
        float* to = held_ + row % TAPS * layer_.row();
        if (holds_[row % TAPS] == row) return to;
        holds_[row % TAPS] = row;
        for (int64_t i = 0; i < layer_.W; i++)
            for (int64_t c = 0; c < layer_.C; c += L) {
                const float* from = layer_.x + (row * layer_.W + i) * layer_.C + c;
                float* place = to + (c / L * layer_.width() + REACH + i) * L;
                // Numbers of the next token that come along have weights of zero, and results that nothing reads.
                if (c + L <= layer_.C || (layer_.C >= L && row * layer_.W + i + 1 < tokens_)) store(place, load(from));
                else std::copy_n(from, layer_.C - c, place);
            }
        return to;
    }

    void compute_row() {
        const int64_t y = row_ % layer_.H;
        const int64_t above = std::min<int64_t>(y, REACH), below = std::min<int64_t>(layer_.H - 1 - y, REACH);
        const float* rows[TAPS];
        for (int64_t k = -above; k <= below; k++) rows[k + above] = hold(row_ + k);
        for (int64_t g = 0; g < layer_.groups(); g++)
            for (int64_t i = 0; i < layer_.W; i += OUTPUTS) {
                Vector<float> sums[OUTPUTS];
                for (auto& sum : sums) sum = load(bias_ + g * L);
                for (int64_t k = 0; k <= above + below; k++) {
                    const float* weight = weight_ + (g * TAPS + k + REACH - above) * TAPS * L;
                    const float* in = rows[k] + (g * layer_.width() + i) * L;
                    Vector<float> inputs[OUTPUTS + TAPS - 1];
#pragma GCC unroll 16
                    for (int j = 0; j < OUTPUTS + TAPS - 1; j++) inputs[j] = load(in + j * L);
#pragma GCC unroll 8
                    for (int tap = 0; tap < TAPS; tap++) {
                        const Vector<float> factor = load(weight + tap * L);
#pragma GCC unroll 8
                        for (int j = 0; j < OUTPUTS; j++) sums[j] += factor * inputs[j + tap];
                    }
                }
                float* to = features_ + (ready_ + i) * stride() + g * L;
                for (int j = 0; j < OUTPUTS; j++) store(to + j * stride(), sums[j]);
            }
        row_++;
    }

    const Layer& layer_;
    int64_t tokens_, row_, first_, ready_ = 0;  // the next row, the token of the first features and how many there are
    int64_t holds_[TAPS];
    float *weight_, *bias_, *held_, *features_;
};

}  // namespace convneur
