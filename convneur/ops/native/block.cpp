// The parts of a block before and after its memory for CPUs, without gradients, a tile of tokens at a time, so that what
// they need stays in cache.
//
// Activations of a tile are (channels, tokens), with tokens side by side in vectors: a layer's weight is then read number
// by number, as PyTorch keeps it, and norms over channels are sums of vectors. A token is computed alike whatever its
// place, the number of tokens and the number of threads: results are the same to the bit.
//
// Shape legend: B images of H x W positions, N = B H W tokens, C channels, h hidden width, d bottleneck width. Weights are
// (out, in), biases (out,).

#include "depthwise.h"
#include "vectors.h"

using namespace convneur;

namespace {

constexpr int64_t L = LANES<float>, TILE = COLUMNS * L;  // tokens side by side
constexpr int64_t PANEL = 128;  // hidden channels whose activations stay in the first-level cache, at most

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
        const Vector<float> scale = 1.0f / (length < float(NORM_EPS) ? Vector<float>{} + float(NORM_EPS) : length);
        for (int64_t c = 0; c < channels; c++) store(first + c * TILE, load(first + c * TILE) * scale);
    }
}

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
    const Depthwise::Layer depthwise{H, W, C, TILE, x, depthwise_weight, depthwise_bias};
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
