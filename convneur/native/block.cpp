// The parts of a block before and after its memory for CPUs, without gradients, a tile of tokens at a time, so that what
// they need stays in cache.
//
// Activations of a tile are (channels, tokens), with tokens side by side in vectors: a layer's weight is then read number
// by number, as PyTorch keeps it, and norms over channels are sums of vectors. A token is computed alike whatever its
// place, the number of tokens and the number of threads: results are the same to the bit.
//
// Shape legend: B images of H x W positions, N = B H W tokens, C channels, h hidden width, d bottleneck width. Weights are
// (out, in), biases (out,).

#include "vectors.h"

using namespace convneur;

namespace {

constexpr int64_t L = LANES<float>, TILE = COLUMNS * L;  // tokens side by side
constexpr int64_t PANEL = 128;  // hidden channels whose activations stay in the first-level cache, at most
constexpr float NORM_EPS = 1e-12f;  // as in convneur.memory_fused

// y = W x + bias. W (out, in) has element (i, p) at i * row + p * column; without a bias it is zero.
struct Linear {
    int64_t in, out;
    Operand<float> weight;
    const float* bias;
};

// PyTorch's linear layer
Linear linear(int64_t in, int64_t out, const float* weight, const float* bias) { return {in, out, {weight, in, 1}, bias}; }

struct Norm {
    float eps;
    const float *weight, *bias;
};

void fill_with_bias(const Linear& layer, int64_t vectors, float* y) {
    for (int64_t i = 0; i < layer.out; i++)
        for (int64_t j = 0; j < vectors; j++)
            store(y + i * TILE + j * L, Vector<float>{} + (layer.bias ? layer.bias[i] : 0.0f));
}

// y (out, TILE) of x (in, TILE), the tile's first vectors
void apply(const Linear& layer, int64_t vectors, const float* x, float* y) {
    fill_with_bias(layer, vectors, y);
    product(layer.out, vectors * L, layer.in, layer.weight, x, TILE, y, TILE, ADD);
}

// y = down(GELU(up(x))), with room for a panel of hidden channels in u
void apply(const Linear& up, const Linear& down, int64_t vectors, const float* x, float* u, float* y) {
    fill_with_bias(down, vectors, y);
    const int64_t panels = (up.out + PANEL - 1) / PANEL, panel = ((up.out + panels - 1) / panels + ROWS - 1) / ROWS * ROWS;
    for (int64_t first = 0; first < up.out; first += panel) {
        const int64_t width = std::min(panel, up.out - first);
        Operand<float> rows = up.weight, columns = down.weight;
        rows.data += first * rows.row, columns.data += first * columns.column;
        product(width, vectors * L, up.in, rows, x, TILE, u, TILE);
        for (int64_t i = 0; i < width; i++)
            for (int64_t j = i * TILE; j < i * TILE + vectors * L; j += L)
                store(u + j, gelu<float>(load(u + j) + (up.bias ? up.bias[first + i] : 0.0f)).value);
        product(down.out, vectors * L, width, columns, u, TILE, y, TILE, ADD);
    }
}

// The sum over channels of (x - shift)^2, or of x itself
template <bool SQUARES> Vector<float> sum(int64_t channels, const float* x, Vector<float> shift = Vector<float>{}) {
    Vector<float> result{};
    for (int64_t c = 0; c < channels; c++) {
        const Vector<float> value = load(x + c * TILE) - shift;
        result += SQUARES ? value * value : value;
    }
    return result;
}

Vector<float> square_root(Vector<float> x) {
    for (int i = 0; i < L; i++) x[i] = std::sqrt(x[i]);
    return x;
}

// Every token of x (channels, TILE) less its mean over channels, over its standard deviation, scaled and shifted.
void apply(const Norm& norm, int64_t channels, int64_t vectors, float* x) {
    for (float* first = x; first < x + vectors * L; first += L) {
        const Vector<float> mean = sum<false>(channels, first) / float(channels);
        const Vector<float> variance = sum<true>(channels, first, mean) / float(channels);
        const Vector<float> scale = 1.0f / square_root(variance + norm.eps);
        for (int64_t c = 0; c < channels; c++) {
            float* value = first + c * TILE;
            store(value, (load(value) - mean) * scale * norm.weight[c] + norm.bias[c]);
        }
    }
}

// Brings every token of x (channels, TILE) to length 1, as the memory's queries.
void normalise(int64_t channels, int64_t vectors, float* x) {
    for (float* first = x; first < x + vectors * L; first += L) {
        const Vector<float> length = square_root(sum<true>(channels, first));
        const Vector<float> scale = 1.0f / (length < NORM_EPS ? Vector<float>{} + NORM_EPS : length);
        for (int64_t c = 0; c < channels; c++) store(first + c * TILE, load(first + c * TILE) * scale);
    }
}

constexpr int TAPS = 7, REACH = TAPS / 2;    // of the depthwise convolution, a side
constexpr int OUTPUTS = BYTES == 64 ? 8 : 4;  // side by side, whose sums and inputs stay in registers

// The depthwise convolution of images x (B, H, W, C), by rows as they are asked for.
class Depthwise {
  public:
    struct Layer {
        int64_t H, W, C;
        const float *x, *weight, *bias;  // weight (C, 1, TAPS, TAPS)

        int64_t groups() const { return (C + L - 1) / L; }
        int64_t width() const { return (W + OUTPUTS - 1) / OUTPUTS * OUTPUTS + TAPS - 1; }
        int64_t row() const { return groups() * width() * L; }
        int64_t numbers() const {
            return groups() * L * (TAPS * TAPS + 1) + TAPS * row() + groups() * L * (2 * W + TILE + OUTPUTS);
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

// Splits tokens among threads in whole vectors. For each, `begin` is given its first token and `numbers` zeros to work
// with; what it returns is then called for every tile, with its first token, number of tokens and number of vectors.
template <typename Begin> int over_tiles(int64_t N, int64_t numbers, int threads, Begin begin) {
    const int64_t vectors = (N + L - 1) / L;
    const int team = int(std::clamp<int64_t>(vectors, 1, threads));
    bool whole = true;
#pragma omp parallel for num_threads(team) schedule(static) reduction(&& : whole)
    for (int part = 0; part < team; part++) {
        Arena<float> memory(numbers);
        whole = whole && !memory.failed();
        if (memory.failed()) continue;
        const int64_t first = vectors * part / team, last = vectors * (part + 1) / team;
        auto work = begin(first * L, memory.take(numbers));
        for (int64_t v = first, width; v < last; v += width) {
            width = std::min<int64_t>(last - v, COLUMNS);
            if (last - v == COLUMNS + 1) width--;  // or a single vector would be left, too few sums at once
            work(v * L, std::min(width * L, N - v * L), width);
        }
    }
    return whole ? 0 : 1;
}

}  // namespace

extern "C" {

// out (N, o) = project(norm(reduce(x))), x (N, C); without a project_weight norm(reduce(x)), (N, d). With w1 (d, h) and
// w2 (h, d) the projection makes queries, o = d, and out is what they read from that memory.
int bottleneck(int64_t N, int64_t C, int64_t d, int64_t o, int64_t h, float eps, const float* x,
               const float* reduce_weight, const float* reduce_bias, const float* norm_weight, const float* norm_bias,
               const float* project_weight, const float* project_bias, const float* w1, const float* w2, float* out,
               int threads) {
    const Linear reduce = linear(C, d, reduce_weight, reduce_bias), project = linear(d, o, project_weight, project_bias);
    const Linear up{d, h, {w1, 1, h}, nullptr}, down{h, d, {w2, 1, d}, nullptr};
    const Norm norm{eps, norm_weight, norm_bias};
    return over_tiles(N, (C + d + o + PANEL) * TILE, threads, [&](int64_t, float* scratch) {
        float *wide = scratch, *reduced = wide + C * TILE, *projected = reduced + d * TILE, *u = projected + o * TILE;
        return [=](int64_t first, int64_t rows, int64_t vectors) {
            transpose(rows, C, x + first * C, C, wide, TILE);
            apply(reduce, vectors, wide, reduced);
            apply(norm, d, vectors, reduced);
            if (project_weight) apply(project, vectors, reduced, projected);
            if (w1) {
                normalise(o, vectors, projected);
                apply(up, down, vectors, projected, u, reduced);
            }
            transpose(o, rows, project_weight && !w1 ? projected : reduced, TILE, out + first * o, o);
        };
    });
}

// out = x + gamma * y, (B, H, W, C), with y of x and context (B, H, W, d):
// f = down(GELU(up(norm(depthwise(x))))), g = expand(context), and y = f without context, or else sigmoid(g) * f if
// `gate`, f + g, or project([f, g]) with a project_weight (C, 2C).
int block_output(int64_t B, int64_t H, int64_t W, int64_t C, int64_t h, int64_t d, int64_t gate, float eps, const float* x,
                 const float* depthwise_weight, const float* depthwise_bias, const float* norm_weight,
                 const float* norm_bias, const float* up_weight, const float* up_bias, const float* down_weight,
                 const float* down_bias, const float* gamma, const float* context, const float* expand_weight,
                 const float* expand_bias, const float* project_weight, const float* project_bias, float* out,
                 int threads) {
    const Depthwise::Layer depthwise{H, W, C, x, depthwise_weight, depthwise_bias};
    const Norm norm{eps, norm_weight, norm_bias};
    const Linear up = linear(C, h, up_weight, up_bias), down = linear(h, C, down_weight, down_bias);
    const Linear expand = linear(d, C, expand_weight, expand_bias), project = linear(2 * C, C, project_weight, project_bias);
    const int64_t N = B * H * W, tile = (3 * C + PANEL + d) * TILE;
    return over_tiles(N, tile + depthwise.numbers(), threads, [&](int64_t token, float* scratch) {
        float *y = scratch, *f = y + C * TILE, *g = f + C * TILE, *u = g + C * TILE, *reduced = u + PANEL * TILE;
        return [=, local = Depthwise(depthwise, N, token, scratch + tile)](
                   int64_t first, int64_t rows, int64_t vectors) mutable {
            transpose(rows, C, local.features(first, rows), local.stride(), y, TILE);
            apply(norm, C, vectors, y);
            apply(up, down, vectors, y, u, f);
            if (context) {
                transpose(rows, d, context + first * d, d, reduced, TILE);
                apply(expand, vectors, reduced, g);
            }
            if (project_weight) apply(project, vectors, f, y);  // g lies behind f
            for (int64_t i = 0; i < C; i++)
                for (int64_t j = i * TILE; j < i * TILE + vectors * L; j += L) {
                    Vector<float> fused = load(f + j);
                    if (project_weight) fused = load(y + j);
                    else if (context) fused = gate ? sigmoid(load(g + j)) * fused : fused + load(g + j);
                    store(y + j, fused * gamma[i]);
                }
            transpose(C, rows, y, TILE, out + first * C, C);
            for (int64_t i = first * C; i < (first + rows) * C; i++) out[i] += x[i];
        };
    });
}
}
