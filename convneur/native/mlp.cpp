// An MLP over channels for CPUs, down(GELU(up(x))), without anything of size (rows, hidden width) in memory.
//
// Rows are computed alike whatever their number, their place and the number of threads: results are the same to the bit.
//
// Shape legend: N rows, C channels, h hidden width. Rows of C and h numbers are padded with zeros to D and H.

#include "vectors.h"

using namespace convneur;

namespace {

constexpr int64_t TILE = 104, PANEL = 24 * LANES<float>;  // rows and hidden channels whose activations stay in cache

}  // namespace

// x, out: (N, C). up: (h, C), up_bias: (h,), down: (C, h), down_bias: (C,), as PyTorch's. Returns 0, or 1 where memory
// ran out.
extern "C" int channel_mlp_float(int64_t N, int64_t C, int64_t h, const float* x, const float* up, const float* up_bias,
                                 const float* down, const float* down_bias, float* out, int threads) {
    typedef Arena<float> Memory;
    const int64_t D = padded<float>(C, 512), H = padded<float>(h, 1024), L = LANES<float>;
    const int64_t Cv = whole_vectors<float>(C), hv = whole_vectors<float>(h), tiles = (N + TILE - 1) / TILE;
    Memory shared(Memory::rounded(C * H) + Memory::rounded(h * D) + Memory::rounded(H) + Memory::rounded(D));
    if (shared.failed()) return 1;
    float *w1 = shared.take(C * H), *w2 = shared.take(h * D), *b1 = shared.take(H), *b2 = shared.take(D);
    std::copy_n(up_bias, h, b1), std::copy_n(down_bias, C, b2);

    bool whole = true;
    const int team = int(std::clamp<int64_t>(tiles, 1, threads));
    constexpr int64_t SOME = 16;  // rows of a weight, which are a cache line of its transpose
#pragma omp parallel num_threads(team) reduction(&& : whole)
    {
        Memory own(Memory::rounded(TILE * PANEL) + Memory::rounded(TILE * D));
        whole = !own.failed();
        float *u = own.take(TILE * PANEL), *sums = own.take(TILE * D);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < h; i += SOME) transpose(std::min(SOME, h - i), C, up + i * C, C, w1 + i, H);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < C; i += SOME) transpose(std::min(SOME, C - i), h, down + i * h, h, w2 + i, D);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < N; first += TILE) {
            if (!whole) continue;
            const int64_t rows = std::min(TILE, N - first);
            for (int64_t i = 0; i < rows; i++) std::copy_n(b2, D, sums + i * D);
            for (int64_t panel = 0; panel < hv; panel += PANEL) {
                const int64_t width = std::min(PANEL, hv - panel);
                product(rows, width, C, {x + first * C, C, 1}, w1 + panel, H, u, PANEL);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < width; j += L) {
                        float* a = u + i * PANEL + j;
                        store(a, gelu<float>(load(a) + load(b1 + panel + j)).value);
                    }
                product(rows, Cv, std::min(width, h - panel), {u, PANEL, 1}, w2 + panel * D, D, sums, D, ADD);
            }
            copy_rows(rows, C, sums, D, out + first * C, C);
        }
    }
    return whole ? 0 : 1;
}
