// The neural memory's recurrence for CPUs, forward and backward, with everything that a few tokens need kept in cache.
//
// `../memory/equations.py` has the equations, `../memory/eager.py` the same loop with one PyTorch call an operation; they
// share this file's names. Every tile of TILE tokens passes through all products and through GELU before the next one
// starts, so that nothing of size (tokens, hidden width) goes to memory. An image is computed by one thread, in one
// order, whatever the number of threads: results are the same to the bit for any.
//
// Shape legend: B images, N tokens, M written tokens, U updates, S steps, d memory width, h hidden width. Rows of d and h
// numbers lie D and H numbers apart, of which products compute the dv and hv that make whole vectors. W1 (d, h) and
// W2^T (d, h) are held one after the other, as states are; (h, d) transposes of either are made where a product needs
// them.

#include "vectors.h"

namespace {

using namespace convneur;

constexpr int64_t TILE = 64;  // tokens whose hidden activations stay in cache

// Brings raw vectors to length 1, into x (rows, D), and writes their reciprocal norms, two numbers apart, if asked to.
template <typename T>
void normalise(int64_t rows, int64_t d, const T* raw, int64_t raw_row, T* x, int64_t D, T* scales) {
    T scale[TILE];
    for (int64_t i = 0; i < rows; i++) scale[i] = dot(d, raw + i * raw_row, raw + i * raw_row);
    for (int64_t i = 0; i < rows; i++) scale[i] = 1 / std::max(std::sqrt(scale[i]), T(NORM_EPS));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < d; j++) x[i * D + j] = raw[i * raw_row + j] * scale[i];
    if (scales)
        for (int64_t i = 0; i < rows; i++) scales[2 * i] = scale[i];
}

// Gradient of what times scale is x, a vector of length 1, from that of x.
template <typename T> void through_norm(int64_t n, const T* x, T scale, const T* dx, T* out) {
    const T along = dot(n, x, dx);
    for (int64_t j = 0; j < n; j++) out[j] = (dx[j] - along * x[j]) * scale;
}

template <typename T> struct Problem {
    int64_t images, tokens, written, steps, updates, d, h;
    const int64_t *keys, *queries;  // tokens that each step writes and reads
    T inner_lr;
    const T *qkv, *start, *generator_weight, *generator_bias;
    T *states, *surprises, *factors, *errors, *scales;  // written by forward, where there are any, and read by backward
    T* context;
    const T* d_context;
    T *d_qkv, *d_starts, *d_logits;

    int64_t D() const { return padded<T>(d, 512); }
    int64_t H() const { return padded<T>(h, 1024); }
    T* state(int64_t update, int64_t kind, int64_t matrix, int64_t image) const {
        return states + (((update * 2 + kind) * 2 + matrix) * images + image) * d * h;
    }
};

// ---- Forward -----------------------------------------------------------------------------------------------------

template <typename T> bool forward_image(const Problem<T>& p, int64_t image) {
    const int64_t d = p.d, h = p.h, D = p.D(), H = p.H(), matrix = d * H, L = LANES<T>;
    const int64_t dv = whole_vectors<T>(d), hv = whole_vectors<T>(h);
    Arena<T> arena(3 * 2 * Arena<T>::rounded(matrix) + Arena<T>::rounded(h * D) + 3 * Arena<T>::rounded(TILE * D) +
                   2 * Arena<T>::rounded(TILE * H) + Arena<T>::rounded(D) + Arena<T>::rounded(3 * d));
    if (arena.failed()) return false;
    T *weights[2], *velocity[2], *gradient[2];
    for (auto matrices : {weights, velocity, gradient})
        for (int m = 0; m < 2; m++) matrices[m] = arena.take(matrix);
    T *w2 = arena.take(h * D), *x = arena.take(TILE * D), *error = arena.take(TILE * D), *recalled = arena.take(TILE * D);
    T *u = arena.take(TILE * H), *back = arena.take(TILE * H);
    T *surprise = arena.take(D), *factor = arena.take(3 * d);

    for (int m = 0; m < 2; m++) copy_rows(d, h, p.start + m * d * h, h, weights[m], H);
    const T *raw_q = p.qkv + image * p.tokens * 3 * d, *raw_k = raw_q + d, *value = raw_q + 2 * d;
    T* scales = p.scales ? p.scales + image * p.tokens * 2 : nullptr;
    if (scales) std::fill_n(scales, p.tokens * 2, T(0));  // those of keys that aren't written are never computed
    int64_t key = 0, query = 0;
    T *context = p.context + image * p.tokens * d, *kept_error = p.errors ? p.errors + image * p.written * d : nullptr;

    for (int64_t t = 0; t < p.steps; t++) {
        transpose(d, h, weights[1], H, w2, D);
        for (int64_t done = 0, n = p.queries[t]; done < n; done += TILE) {
            const int64_t rows = std::min(TILE, n - done);
            normalise(rows, d, raw_q + query * 3 * d, 3 * d, x, D, scales ? scales + query * 2 : nullptr);
            product(rows, hv, d, {x, D, 1}, weights[0], H, u, H);
            for (int64_t j = 0; j < rows * H; j += L) store(u + j, gelu<T>(load(u + j)).value);
            product(rows, dv, h, {u, H, 1}, w2, D, recalled, D);
            copy_rows(rows, d, recalled, D, context + query * d, d);
            query += rows;
        }
        const int64_t n = p.keys[t];
        if (!n) continue;

        std::fill_n(surprise, D, T(0));
        for (int m = 0; m < 2; m++) std::fill_n(gradient[m], matrix, T(0));
        for (int64_t done = 0; done < n; done += TILE) {
            const int64_t rows = std::min(TILE, n - done);
            T* slope = back;  // overwritten number by number
            normalise(rows, d, raw_k + key * 3 * d, 3 * d, x, D, scales ? scales + key * 2 + 1 : nullptr);
            product(rows, hv, d, {x, D, 1}, weights[0], H, u, H);
            for (int64_t j = 0; j < rows * H; j += L) {
                const Gelu<T> g = gelu<T>(load(u + j));
                store(u + j, g.value), store(slope + j, g.slope);
            }
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < d; j++) error[i * D + j] = -value[(key + i) * 3 * d + j];
            product(rows, dv, h, {u, H, 1}, w2, D, error, D, ADD);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < dv; j += L) {
                    const Vector<T> e = load(error + i * D + j);
                    store(surprise + j, load(surprise + j) + e * e);
                }
            if (kept_error) copy_rows(rows, d, error, D, kept_error + key * d, d);
            product(d, hv, rows, {error, 1, D}, u, H, gradient[1], H, ADD);
            T* du = u;
            product(rows, hv, d, {error, D, 1}, weights[1], H, du, H);
            for (int64_t j = 0; j < rows * H; j += L) store(back + j, load(du + j) * load(slope + j));
            product(d, hv, rows, {x, 1, D}, back, H, gradient[0], H, ADD);
            key += rows;
        }

        for (int64_t j = 0; j < d; j++) surprise[j] /= T(n);
        for (int64_t j = 0; j < 3 * d; j++)
            factor[j] = 1 / (1 + std::exp(-(p.generator_bias[j] + dot(d, p.generator_weight + j * d, surprise))));
        for (int64_t m = 0; m < 2; m++)
            for (int64_t i = 0; i < d; i++) {
                const T rate = -p.inner_lr * factor[i] * 2 / T(n), eta = factor[d + i], retention = 1 - factor[2 * d + i];
                T *w = weights[m] + i * H, *z = velocity[m] + i * H, *g = gradient[m] + i * H;
                for (int64_t j = 0; j < H; j += L) {
                    const Vector<T> velocity = eta * load(z + j) + rate * load(g + j);
                    store(z + j, velocity), store(w + j, retention * load(w + j) + velocity);
                }
            }
        if (p.states) {
            for (int m = 0; m < 2; m++) copy_rows(d, h, weights[m], H, p.state(t, 0, m, image), h);
            for (int m = 0; m < 2; m++) copy_rows(d, h, velocity[m], H, p.state(t, 1, m, image), h);
            std::copy_n(surprise, d, p.surprises + (t * p.images + image) * d);
            std::copy_n(factor, 3 * d, p.factors + (t * p.images + image) * 3 * d);
        }
    }
    return true;
}

// ---- Backward ----------------------------------------------------------------------------------------------------

template <typename T> bool backward_image(const Problem<T>& p, int64_t image) {
    const int64_t d = p.d, h = p.h, D = p.D(), H = p.H(), matrix = d * H, L = LANES<T>;
    const int64_t dv = whole_vectors<T>(d), hv = whole_vectors<T>(h);
    Arena<T> arena(5 * 2 * Arena<T>::rounded(matrix) + 4 * Arena<T>::rounded(h * D) + 4 * Arena<T>::rounded(TILE * D) +
                   6 * Arena<T>::rounded(TILE * H) + Arena<T>::rounded(d));
    if (arena.failed()) return false;
    // of the state before the step; adjoints of the weights and of the velocity that the step leaves, of the gradient
    T *weights[2], *d_weights[2], *d_velocity[2], *d_gradient[2], *transposed_w[2], *transposed_dg[2];
    for (auto matrices : {weights, d_weights, d_velocity, d_gradient})
        for (int m = 0; m < 2; m++) matrices[m] = arena.take(matrix);
    for (auto matrices : {transposed_w, transposed_dg})
        for (int m = 0; m < 2; m++) matrices[m] = arena.take(h * D);
    T *x = arena.take(TILE * D), *dx = arena.take(TILE * D), *error = arena.take(TILE * D), *d_error = arena.take(TILE * D);
    T *u = arena.take(TILE * H), *slope = arena.take(TILE * H), *curvature = arena.take(TILE * H);
    T *back = arena.take(TILE * H), *d_back = arena.take(TILE * H), *da = arena.take(TILE * H);
    T* d_surprise = arena.take(d);

    // Both start behind the last token and go backwards with the steps.
    int64_t key = 0, query = p.tokens;
    for (int64_t t = 0; t < p.steps; t++) key += p.keys[t];
    const T *qkv = p.qkv + image * p.tokens * 3 * d, *scales = p.scales + image * p.tokens * 2;
    T* d_qkv = p.d_qkv + image * p.tokens * 3 * d;
    for (int64_t i = key; i < p.tokens; i++) std::fill_n(d_qkv + i * 3 * d + d, 2 * d, T(0));  // never written

    for (int64_t t = p.steps; t-- > 0;) {
        const int64_t before = std::min(t, p.updates) - 1, n = p.keys[t];
        for (int m = 0; m < 2; m++) {
            copy_rows(d, h, before < 0 ? p.start + m * d * h : p.state(before, 0, m, image), h, weights[m], H);
            transpose(d, h, weights[m], H, transposed_w[m], D);
        }
        const T* factor = n ? p.factors + (t * p.images + image) * 3 * d : nullptr;
        if (n) {
            T* d_logits = p.d_logits + (t * p.images + image) * 3 * d;
            for (int64_t i = 0; i < d; i++) {
                const T theta = factor[i], eta = factor[d + i], alpha = factor[2 * d + i], rate = -p.inner_lr * theta;
                T along_weights = 0, along_old = 0, along_new = 0;
                for (int m = 0; m < 2; m++) {
                    T *dw = d_weights[m] + i * H, *dz = d_velocity[m] + i * H, *dg = d_gradient[m] + i * H;
                    along_weights += dot(h, dw, weights[m] + i * H);
                    if (t) along_old += dot(h, dz, p.state(t - 1, 1, m, image) + i * h);
                    along_new += dot(h, dz, p.state(t, 1, m, image) + i * h);
                    for (int64_t j = 0; j < H; j += L) {
                        store(dg + j, rate * load(dz + j));
                        store(dw + j, (1 - alpha) * load(dw + j));
                    }
                }
                // What theta scales is the new velocity less eta times the old one.
                d_logits[i] = (along_new - eta * along_old) * (1 - theta);
                d_logits[d + i] = eta * along_old * (1 - eta);
                d_logits[2 * d + i] = alpha * along_weights * (alpha - 1);
            }
            for (int64_t j = 0; j < d; j++) d_surprise[j] = 0;
            for (int64_t i = 0; i < 3 * d; i++)
                for (int64_t j = 0; j < d; j++) d_surprise[j] += d_logits[i] * p.generator_weight[i * d + j];
            for (int m = 0; m < 2; m++) transpose(d, h, d_gradient[m], H, transposed_dg[m], D);
        }

        key -= n;
        for (int64_t done = 0; done < n; done += TILE) {
            const int64_t rows = std::min(TILE, n - done), first = key + done;
            const T *raw = qkv + first * 3 * d + d, *scale = scales + first * 2 + 1, two_over_n = T(2) / T(n);
            const T* kept = p.errors + (image * p.written + first) * d;
            T* out = d_qkv + first * 3 * d + d;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < d; j++) {
                    x[i * D + j] = raw[i * 3 * d + j] * scale[2 * i];
                    error[i * D + j] = kept[i * d + j] * two_over_n;
                }
            T* du = da;
            product(rows, hv, d, {x, D, 1}, weights[0], H, u, H);
            product(rows, hv, d, {error, D, 1}, weights[1], H, du, H);
            product(rows, hv, d, {x, D, 1}, d_gradient[0], H, d_back, H);
            for (int64_t j = 0; j < rows * H; j += L) {
                const Gelu<T> g = gelu<T>(load(u + j));
                const Vector<T> from_loss = load(du + j), through = load(d_back + j);
                store(u + j, g.value), store(slope + j, g.slope), store(curvature + j, g.curvature * from_loss * through);
                store(back + j, from_loss * g.slope), store(d_back + j, through * g.slope);
            }
            product(rows, dv, h, {u, H, 1}, transposed_dg[1], D, d_error, D);
            product(rows, dv, h, {d_back, H, 1}, transposed_w[1], D, d_error, D, ADD);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < d; j++) {
                    T& e = d_error[i * D + j];
                    e = two_over_n * e + error[i * D + j] * d_surprise[j];
                    out[i * 3 * d + d + j] = -e;
                }
            product(rows, hv, d, {d_error, D, 1}, weights[1], H, da, H);
            product(rows, hv, d, {error, D, 1}, d_gradient[1], H, da, H, ADD);
            for (int64_t j = 0; j < rows * H; j += L)
                store(da + j, load(da + j) * load(slope + j) + load(curvature + j));
            product(rows, dv, h, {da, H, 1}, transposed_w[0], D, dx, D);
            product(rows, dv, h, {back, H, 1}, transposed_dg[0], D, dx, D, ADD);
            for (int64_t i = 0; i < rows; i++) through_norm(d, x + i * D, scale[2 * i], dx + i * D, out + i * 3 * d);
            product(d, hv, rows, {x, 1, D}, da, H, d_weights[0], H, ADD);
            product(d, hv, rows, {d_error, 1, D}, u, H, d_weights[1], H, ADD);
            product(d, hv, rows, {error, 1, D}, d_back, H, d_weights[1], H, ADD);
        }

        query -= p.queries[t];
        for (int64_t done = 0, n = p.queries[t]; done < n; done += TILE) {
            const int64_t rows = std::min(TILE, n - done), first = query + done;
            const T *raw = qkv + first * 3 * d, *scale = scales + first * 2;
            const T* d_context = p.d_context + (image * p.tokens + first) * d;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < d; j++) x[i * D + j] = raw[i * 3 * d + j] * scale[2 * i];
            product(rows, hv, d, {x, D, 1}, weights[0], H, u, H);
            product(rows, hv, d, {d_context, d, 1}, weights[1], H, da, H);
            for (int64_t j = 0; j < rows * H; j += L) {
                const Gelu<T> g = gelu<T>(load(u + j));
                store(u + j, g.value), store(da + j, load(da + j) * g.slope);
            }
            product(rows, dv, h, {da, H, 1}, transposed_w[0], D, dx, D);
            for (int64_t i = 0; i < rows; i++)
                through_norm(d, x + i * D, scale[2 * i], dx + i * D, d_qkv + (first + i) * 3 * d);
            product(d, hv, rows, {x, 1, D}, da, H, d_weights[0], H, ADD);
            product(d, hv, rows, {d_context, 1, d}, u, H, d_weights[1], H, ADD);
        }

        // The weights before this step are those before it, decayed, plus the velocity before it.
        for (int m = 0; m < 2; m++)
            for (int64_t i = 0; i < d; i++) {
                const T eta = n ? factor[d + i] : T(0);
                T *dw = d_weights[m] + i * H, *dz = d_velocity[m] + i * H;
                for (int64_t j = 0; j < H; j += L) store(dz + j, eta * load(dz + j) + load(dw + j));
            }
    }
    for (int64_t m = 0; m < 2; m++) copy_rows(d, h, d_weights[m], H, p.d_starts + (m * p.images + image) * d * h, h);
    return true;
}

template <typename T> int over_images(bool (*one)(const Problem<T>&, int64_t), const Problem<T>* p, int threads) {
    const int team = int(std::clamp<int64_t>(p->images, 1, threads));
    bool whole = true;
#pragma omp parallel for num_threads(team) schedule(static) reduction(&& : whole)
    for (int64_t image = 0; image < p->images; image++) whole = one(*p, image) && whole;
    return whole ? 0 : 1;
}

}  // namespace

// Each returns 0, or 1 where memory ran out.
extern "C" {
int forward_float(const Problem<float>* p, int threads) { return over_images(forward_image<float>, p, threads); }
int forward_double(const Problem<double>* p, int threads) { return over_images(forward_image<double>, p, threads); }
int backward_float(const Problem<float>* p, int threads) { return over_images(backward_image<float>, p, threads); }
int backward_double(const Problem<double>* p, int threads) { return over_images(backward_image<double>, p, threads); }
}
