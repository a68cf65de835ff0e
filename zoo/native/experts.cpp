// Gated experts (silu) in fp32 on a CPU: products, activations and their gradients in one pass over each expert's rows.
//
// Called by zoo/blocks/compiled.py, which says what the arguments are; without a compiler zoo does the same
// arithmetic by torch (zoo/blocks/grouped.py). Every expert's numbers come from one thread in one order, so equal inputs
// give equal bits whatever the number of threads. Products follow Goto and van de Geijn (doi:10.1145/1356052.1356053):
// both factors are packed into panels that stay in cache while a small tile of the result stays in registers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"
#ifdef _OPENMP
#include <omp.h>
#else  // one thread is all there is, and all that is asked for
inline int omp_get_thread_num() { return 0; }
#endif

namespace {

using tiles::LANES, tiles::TILE_ROWS, tiles::TILE_COLS, tiles::vec, tiles::load, tiles::store;

constexpr long DEPTH = 256;                  // of a packed panel: one of the right factor fits in L1
constexpr long ROWS = 16 * TILE_ROWS;        // of the packed left factor: fits in L2
constexpr long COLS = 512;                   // of the packed right factor
constexpr long FEW = 40;                     // up to so many rows, packing a weight costs more than it saves
constexpr long BLOCK_NUMBERS = 1 << 20;      // activations of a block of rows
constexpr long BLOCK_ROWS = 512;

typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

// The sum of a register's numbers, by halves.
inline float total(vec v) {
    typedef float half __attribute__((vector_size(LANES * 2)));
    typedef float quarter __attribute__((vector_size(LANES)));
    half h[2];
    std::memcpy(h, &v, sizeof(v));
    const half one = h[0] + h[1];
    quarter q[2];
    std::memcpy(q, &one, sizeof(one));
    const quarter rest = q[0] + q[1];
    float sum = rest[0];
    for (long i = 1; i < LANES / 4; i++) sum += rest[i];
    return sum;
}

// A factor of a product. Plain: element (i, j) is p[row(i) * ld + j]; turned: p[row(j) * ld + i].
struct Matrix {
    const float* p;
    long ld;
    bool turned = false;
    const int64_t* rows = nullptr;  // where each row is; null: in order
    const float* row(long i) const { return p + (rows ? rows[i] : i) * ld; }
};

float* scratch(int place, long numbers) {
    static thread_local std::vector<float> memory[8];
    auto& mine = memory[place];
    if (static_cast<long>(mine.size()) < numbers) mine.resize(numbers);
    return mine.data();
}

// Columns j0.. of width `width` of rows k0..k0+depth, as [panel][depth][width], zeros beyond `count`.
// `along` says whether consecutive columns lie side by side in memory.
template <long WIDTH>
void pack(const Matrix& m, bool along, long j0, long count, long k0, long depth, float* out) {
    for (long j = 0; j < count; j += WIDTH, out += WIDTH * depth) {
        const long width = std::min(WIDTH, count - j);
        if (along) {
            for (long k = 0; k < depth; k++) {
                const float* from = m.row(k0 + k) + j0 + j;
                float* to = out + k * WIDTH;
                if (width == WIDTH) {
                    std::memcpy(to, from, WIDTH * sizeof(float));
                } else {
                    for (long i = 0; i < WIDTH; i++) to[i] = i < width ? from[i] : 0.0f;
                }
            }
        } else {
            const float* from[WIDTH];
            for (long i = 0; i < WIDTH; i++) from[i] = m.row(j0 + j + std::min(i, width - 1)) + k0;
            for (long k = 0; k < depth; k++)
                for (long i = 0; i < WIDTH; i++) out[k * WIDTH + i] = from[i][k];
            if (width < WIDTH)
                for (long k = 0; k < depth; k++)
                    for (long i = width; i < WIDTH; i++) out[k * WIDTH + i] = 0.0f;
        }
    }
}

inline void tile(long depth, const float* a, const float* b, float* c, long ld, bool add) {
    for (long i = 0; i < TILE_ROWS; i++) __builtin_prefetch(c + i * ld, 1);
    vec sum[TILE_ROWS][2] = {};
    for (long k = 0; k < depth; k++, a += TILE_ROWS, b += TILE_COLS) {
        const vec b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 12
        for (long i = 0; i < TILE_ROWS; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
#pragma GCC unroll 12
    for (long i = 0; i < TILE_ROWS; i++)
        for (long j = 0; j < 2; j++) {
            float* to = c + i * ld + j * LANES;
            store(to, add ? load(to) + sum[i][j] : sum[i][j]);
        }
}

// c [m, n] = a [m, k] b [k, n], or added to it.
void product(long m, long n, long k, const Matrix& a, const Matrix& b, float* c, long ld, bool add = false) {
    const long cols = std::min(COLS, (n + TILE_COLS - 1) / TILE_COLS * TILE_COLS);
    float* right = scratch(0, DEPTH * cols);
    float* left = scratch(1, ROWS * DEPTH);
    float edge[TILE_ROWS * TILE_COLS];
    for (long j0 = 0; j0 < n; j0 += cols) {
        const long width = std::min(cols, n - j0);
        for (long k0 = 0; k0 < k; k0 += DEPTH) {
            const long depth = std::min(DEPTH, k - k0);
            const bool more = add || k0 > 0;
            pack<TILE_COLS>(b, !b.turned, j0, width, k0, depth, right);
            for (long i0 = 0; i0 < m; i0 += ROWS) {
                const long height = std::min(ROWS, m - i0);
                pack<TILE_ROWS>(a, a.turned, i0, height, k0, depth, left);
                for (long j = 0; j < width; j += TILE_COLS)
                    for (long i = 0; i < height; i += TILE_ROWS) {
                        float* to = c + (i0 + i) * ld + j0 + j;
                        const float *pa = left + i * depth, *pb = right + j * depth;
                        const long r = std::min(TILE_ROWS, height - i), s = std::min(TILE_COLS, width - j);
                        if (r == TILE_ROWS && s == TILE_COLS) {
                            tile(depth, pa, pb, to, ld, more);
                            continue;
                        }
                        tile(depth, pa, pb, edge, TILE_COLS, false);
                        for (long y = 0; y < r; y++)
                            for (long x = 0; x < s; x++)
                                to[y * ld + x] = edge[y * TILE_COLS + x] + (more ? to[y * ld + x] : 0.0f);
                    }
            }
        }
    }
}

// Scalar products of I rows with J rows of a weight; meanwhile the next J rows are called from memory.
template <int I, int J, bool AHEAD>
void dots(long k, const float* const* x, const float* w, float* c, long ld) {
    vec sum[I][J] = {};
    for (long p = 0; p < k; p += LANES) {
        vec wide[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) {
            wide[j] = load(w + j * k + p);
            if (AHEAD) __builtin_prefetch(w + (J + j) * k + p);
        }
#pragma GCC unroll 4
        for (int i = 0; i < I; i++) {
            const vec mine = load(x[i] + p);
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) sum[i][j] += mine * wide[j];
        }
    }
    for (int i = 0; i < I; i++)
        for (int j = 0; j < J; j++) c[i * ld + j] = total(sum[i][j]);
}

template <int J>
void strip(long m, long k, const float* const* x, const float* w, float* c, long ld) {
    switch (m % 4) {  // the fewest rows first: they have time to wait for memory
        case 3: dots<3, J, true>(k, x, w, c, ld); break;
        case 2: dots<2, J, true>(k, x, w, c, ld); break;
        case 1: dots<1, J, true>(k, x, w, c, ld); break;
        default: dots<4, J, true>(k, x, w, c, ld);
    }
    for (long i = m % 4 ? m % 4 : 4; i < m; i += 4) dots<4, J, false>(k, x + i, w, c + i * ld, ld);
}

// c [m, n] = a [m, k] w^T, w [n, k]: without packing for a few rows, each of w is read once.
void against_rows(long m, long n, long k, const Matrix& a, const float* w, float* c) {
    if (m > FEW) return product(m, n, k, a, Matrix{w, k, true}, c, n);
    const float* x[FEW];
    for (long i = 0; i < m; i++) x[i] = a.row(i);
    long j = 0;
    for (; j + 3 <= n; j += 3) strip<3>(m, k, x, w + j * k, c + j, n);
    for (; j < n; j++) strip<1>(m, k, x, w + j * k, c + j, n);
}

// e^x to 2 units in the last place: 2^n times a polynomial in the rest (Cephes, expf).
inline vec exponential(vec x) {
    const vec zero = {};
    x = x < zero - 87.0f ? zero - 87.0f : x;
    x = x > zero + 88.0f ? zero + 88.0f : x;
    const vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ivec shifted = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)shifted;  // the bits as they are
}

// active [m, f] = silu(gate) * up of hidden [m, 2f].
void activate(long m, long f, const float* hidden, float* active) {
    for (long i = 0; i < m; i++) {
        const float *gate = hidden + 2 * f * i, *up = gate + f;
        for (long j = 0; j < f; j += LANES) {
            const vec g = load(gate + j);
            store(active + f * i + j, g / (1.0f + exponential(-g)) * load(up + j));
        }
    }
}

// From active_grad [m, f], without scale: the gradients of hidden [m, 2f] and of the scales [m], and scale * active.
void pull_back(long m, long f, const float* hidden, const float* active_grad, const float* scale, float* hidden_grad,
               float* scale_grad, float* scaled) {
    for (long i = 0; i < m; i++) {
        const float *gate = hidden + 2 * f * i, *up = gate + f, factor = scale[i];
        float *gate_grad = hidden_grad + 2 * f * i, *up_grad = gate_grad + f;
        vec sum = {};
        for (long j = 0; j < f; j += LANES) {
            const vec g = load(gate + j), u = load(up + j), grad = load(active_grad + f * i + j);
            const vec s = 1.0f / (1.0f + exponential(-g)), silu = g * s, active = silu * u;
            sum += active * grad;
            store(scaled + f * i + j, active * factor);
            store(up_grad + j, grad * silu * factor);
            store(gate_grad + j, grad * u * (s + silu * (1.0f - s)) * factor);
        }
        scale_grad[i] = total(sum);
    }
}

// Work on some rows of an expert, and the thread whose it is.
struct Unit {
    long expert, start, stop;
    int thread;
};

// All work, the longest first, each piece to the thread that has least so far: the same for equal loads.
std::vector<Unit> share(const int64_t* bounds, long num_experts, long rows, int threads) {
    std::vector<Unit> found;
    for (long e = 0; e < num_experts; e++) {
        const long first = bounds[e], n = bounds[e + 1] - first, pieces = std::max(1L, (n + rows - 1) / rows);
        for (long p = 0; p < pieces; p++) found.push_back({e, first + n * p / pieces, first + n * (p + 1) / pieces, 0});
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const Unit& a, const Unit& b) { return a.stop - a.start > b.stop - b.start; });
    std::vector<long> load(threads, 0);
    for (auto& unit : found) {
        unit.thread = std::min_element(load.begin(), load.end()) - load.begin();
        load[unit.thread] += unit.stop - unit.start + 1;
    }
    return found;
}

long block_rows(long f) { return std::clamp(BLOCK_NUMBERS / f, 64L, BLOCK_ROWS); }

// Sums over the choices of each token [t, d], without atomics. With fewer threads than choices, each adds its rows up by
// itself in a copy [t, d] of its own; else each choice has a row [t * c, d], and the rows of a token are added.
struct Sums {
    float *parts, *result;
    long t, c, d;
    int threads;
    bool copies() const { return threads <= c; }
    void start(int thread) const {
        if (copies()) std::memset(parts + thread * t * d, 0, sizeof(float) * t * d);
    }
    // rows [m, d], each times its scale.
    void add(int thread, const float* rows, const float* scale, const int64_t* order, long m) const {
        for (long i = 0; i < m; i++) {
            const float factor = scale ? scale[i] : 1.0f;
            const float* from = rows + i * d;
            float* to = copies() ? parts + (thread * t + order[i] / c) * d : parts + order[i] * d;
            if (copies())
                for (long j = 0; j < d; j++) to[j] += factor * from[j];
            else
                for (long j = 0; j < d; j++) to[j] = factor * from[j];
        }
    }
    void finish(int thread) const {
        const long n = copies() ? threads : c, step = copies() ? t * d : d;
        for (long i = t * thread / threads; i < t * (thread + 1) / threads; i++) {
            const float* from = parts + i * (copies() ? d : c * d);
            float* to = result + i * d;
            std::memcpy(to, from, sizeof(float) * d);
            for (long p = 1; p < n; p++)
                for (long j = 0; j < d; j++) to[j] += from[p * step + j];
        }
    }
};

// What a unit needs to know of its rows.
struct Rows {
    int64_t* token;
    float* scale;
    Rows(const int64_t* order, const float* scales, long m, long c) {
        static thread_local std::vector<int64_t> tokens;
        if (static_cast<long>(tokens.size()) < m) tokens.resize(m);
        token = tokens.data();
        scale = scratch(6, m);
        for (long i = 0; i < m; i++) {
            token[i] = order[i] / c;
            scale[i] = scales ? scales[order[i]] : 1.0f;
        }
    }
};

}  // namespace

extern "C" {

// Sort choices [t * c] by expert, those of an expert in the order of the tokens: order [t * c] says which choice is at
// each place, bounds [e + 1] where the places of each expert start. The result: the most that an expert has; -1: a
// choice is no expert.
long experts_sort(const int64_t* choices, int64_t* order, int64_t* bounds, long num_choices, long num_experts) {
    std::memset(bounds, 0, sizeof(int64_t) * (num_experts + 1));
    for (long i = 0; i < num_choices; i++) {
        if (choices[i] < 0 || choices[i] >= num_experts) return -1;
        bounds[choices[i] + 1]++;
    }
    const long most = *std::max_element(bounds, bounds + num_experts + 1);
    for (long e = 0; e < num_experts; e++) bounds[e + 1] += bounds[e];
    std::vector<int64_t> next(bounds, bounds + num_experts);
    for (long i = 0; i < num_choices; i++) order[next[choices[i]]++] = i;
    return most;
}

void experts_forward(const float* x, const float* scale, const int64_t* order, const int64_t* bounds,
                     const float* first, const float* down, float* hidden, float* parts, float* output,
                     long num_experts, long d, long f, long t, long c, int threads) {
    const auto work = share(bounds, num_experts, block_rows(f), threads);
    const Sums sums{parts, output, t, c, d, threads};
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num();
        sums.start(me);
        for (const auto& unit : work) {
            const long m = unit.stop - unit.start;
            if (unit.thread != me || m == 0) continue;
            const Rows rows(order + unit.start, scale, m, c);
            float* h = hidden ? hidden + 2 * f * unit.start : scratch(2, 2 * f * m);
            float *active = scratch(3, f * m), *y = scratch(4, d * m);
            against_rows(m, 2 * f, d, Matrix{x, d, false, rows.token}, first + 2 * f * d * unit.expert, h);
            activate(m, f, h, active);
            against_rows(m, d, f, Matrix{active, f}, down + d * f * unit.expert, y);
            sums.add(me, y, rows.scale, order + unit.start, m);
        }
#pragma omp barrier
        sums.finish(me);
    }
}

// Gradients that are not wanted are null. Each expert is one thread's, which adds up its matrices' gradients.
void experts_backward(const float* x, const float* grad, const float* scale, const int64_t* order,
                      const int64_t* bounds, const float* first, const float* down, const float* hidden, float* parts,
                      float* x_grad, float* scale_grad, float* first_grad, float* down_grad, long num_experts, long d,
                      long f, long t, long c, int threads) {
    const auto work = share(bounds, num_experts, INT64_MAX, threads);
    const Sums sums{parts, x_grad, t, c, d, threads};
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num();
        if (x_grad) sums.start(me);
        for (const auto& unit : work) {
            if (unit.thread != me) continue;
            const float *first_e = first + 2 * f * d * unit.expert, *down_e = down + d * f * unit.expert;
            float* first_sum = first_grad ? first_grad + 2 * f * d * unit.expert : nullptr;
            float* down_sum = down_grad ? down_grad + d * f * unit.expert : nullptr;
            const long n = unit.stop - unit.start, pieces = (n + block_rows(f) - 1) / block_rows(f);
            if (n == 0) {
                if (first_sum) std::memset(first_sum, 0, sizeof(float) * 2 * f * d);
                if (down_sum) std::memset(down_sum, 0, sizeof(float) * d * f);
            }
            for (long p = 0; p < pieces; p++) {
                const long start = unit.start + n * p / pieces, m = unit.start + n * (p + 1) / pieces - start;
                const Rows rows(order + start, scale, m, c);
                const Matrix inputs{x, d, false, rows.token}, grads{grad, d, false, rows.token};
                const float* h = hidden ? hidden + 2 * f * start : scratch(2, 2 * f * m);
                if (!hidden) against_rows(m, 2 * f, d, inputs, first_e, scratch(2, 2 * f * m));
                float *active_grad = scratch(3, std::max(f, d) * m), *scaled = scratch(4, f * m);
                float *h_grad = scratch(5, 2 * f * m), *scale_sums = scratch(7, m);
                product(m, f, d, grads, Matrix{down_e, f}, active_grad, f);
                pull_back(m, f, h, active_grad, rows.scale, h_grad, scale_sums, scaled);
                if (scale_grad)
                    for (long i = 0; i < m; i++) scale_grad[order[start + i]] = scale_sums[i];
                if (down_sum) product(d, f, m, Matrix{grad, d, true, rows.token}, Matrix{scaled, f}, down_sum, f, p > 0);
                if (first_sum) product(2 * f, d, m, Matrix{h_grad, 2 * f, true}, inputs, first_sum, d, p > 0);
                if (x_grad) {
                    float* rows_grad = active_grad;  // no longer needed
                    product(m, d, 2 * f, Matrix{h_grad, 2 * f}, Matrix{first_e, d}, rows_grad, d);
                    sums.add(me, rows_grad, nullptr, order + start, m);
                }
            }
        }
        if (x_grad) {
#pragma omp barrier
            sums.finish(me);
        }
    }
}
}
