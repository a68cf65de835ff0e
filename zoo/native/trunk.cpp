// What lies between the products of a decoder, in fp32 on a CPU: norms, gated activations, rotary positions and the
// cross-entropy, each in one pass over memory where torch takes several.
//
// Called by zoo/blocks/compiled_trunk.py. Rows are shared out among threads; equal inputs give equal bits for equal
// numbers of threads.

#include "tiles.h"

using namespace tiles;

namespace {

// Rows `from` to `to` are the work of each of `threads` threads.
template <class Work>
void by_rows(int64_t rows, int64_t threads, const Work& work) {
    share(threads, threads, [&](long part) { work(part, rows * part / threads, rows * (part + 1) / threads); });
}

float largest(const float* x, int64_t n) {
    float found = x[0];
    int64_t i = 0;
    if (n >= LANES) {
        vec best = load(x);
        for (i = LANES; i + LANES <= n; i += LANES) {
            const vec next = load(x + i);
            best = next > best ? next : best;
        }
        for (long j = 0; j < LANES; j++) found = std::max(found, best[j]);
    }
    for (; i < n; i++) found = std::max(found, x[i]);
    return found;
}

// The sum in fp64 of sums over blocks.
double total(const float* x, int64_t n) {
    constexpr int64_t BLOCK = 64 * LANES;
    double found = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = std::min(n, start + BLOCK);
        vec sum = {};
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) sum += load(x + i);
        float rest = 0;
        for (long j = 0; j < LANES; j++) rest += sum[j];
        for (; i < end; i++) rest += x[i];
        found += rest;
    }
    return found;
}

// x becomes e^(scale x - shift); the sum of that.
double exponentials(float* x, int64_t n, float scale, float shift) {
    for (int64_t i = 0; i < n; i++) x[i] = exponential(scale * x[i] - shift);
    return total(x, n);
}

struct AttendSizes {
    int64_t batch, s, heads, groups, d, dv, threads;
};
constexpr int64_t QUERIES = 96;  // of a block
constexpr int64_t KEYS = 256;    // of a panel that stays in the first cache

// A block of queries of one head, and the keys that its last query sees.
struct Block {
    int64_t row, head, start, m, n, ld;
    Block(const AttendSizes& z, int64_t row, int64_t head, int64_t number)
        : row(row), head(head), start(number * QUERIES), m(std::min(QUERIES, z.s - start)), n(start + m),
          ld((n + LANES - 1) / LANES * LANES + SPARE) {}
};
int64_t blocks(const AttendSizes& z) { return (z.s + QUERIES - 1) / QUERIES; }
int64_t widest(const AttendSizes& z) { return QUERIES * (z.s + LANES + SPARE); }

// out [m, width] = scores [m, n] times values [n, width].
void weigh(const Block& b, const float* scores, const float* values, int64_t ld_values, int64_t width, float* out,
           int64_t ld_out) {
    for (int64_t j = 0; j < b.n; j += KEYS)
        product(b.m, width, std::min(KEYS, b.n - j), Left{scores + j, b.ld}, Right{values + j * ld_values, ld_values},
                out, ld_out, j > 0);
}

}  // namespace

extern "C" {

// y = x / root(mean(x^2) + eps) * weight: x and y [rows, d], weight [d] or null, factor [rows].
void rms_forward(int64_t rows, int64_t d, int64_t threads, double eps, const float* x, const float* weight, float* y,
                 float* factor) {
    by_rows(rows, threads, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) {
            const float* in = x + i * d;
            float *out = y + i * d, f = float(1 / std::sqrt(dot(in, in, d) / double(d) + eps));
            factor[i] = f;
            if (weight)
                for (int64_t j = 0; j < d; j++) out[j] = in[j] * f * weight[j];
            else
                for (int64_t j = 0; j < d; j++) out[j] = in[j] * f;
        }
    });
}

// weight_grad [threads, d]: parts to be added up; null: not wanted.
void rms_backward(int64_t rows, int64_t d, int64_t threads, const float* x, const float* weight, const float* factor,
                  const float* grad, float* x_grad, float* weight_grad) {
    by_rows(rows, threads, [&](int64_t part, int64_t from, int64_t to) {
        std::vector<float> memory(d);
        float *g = memory.data(), *sums = weight_grad ? weight_grad + part * d : nullptr;
        if (sums) std::fill(sums, sums + d, 0.0f);
        for (int64_t i = from; i < to; i++) {
            const float *in = x + i * d, *given = grad + i * d, f = factor[i];
            float* out = x_grad + i * d;
            if (sums)
                for (int64_t j = 0; j < d; j++) sums[j] += given[j] * in[j] * f;
            if (weight)
                for (int64_t j = 0; j < d; j++) g[j] = given[j] * weight[j];
            else
                std::memcpy(g, given, sizeof(float) * d);
            const float along = dot(g, in, d) * f * f / d;
            for (int64_t j = 0; j < d; j++) out[j] = f * (g[j] - in[j] * along);
        }
    });
}

// y = silu(gate) * up, all of n numbers.
void swiglu_forward(int64_t n, int64_t threads, const float* __restrict gate, const float* __restrict up,
                    float* __restrict y) {
    by_rows(n, threads, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
    });
}

void swiglu_backward(int64_t n, int64_t threads, const float* __restrict gate, const float* __restrict up,
                     const float* __restrict grad, float* __restrict gate_grad, float* __restrict up_grad) {
    by_rows(n, threads, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) {
            const float g = gate[i], s = sigmoid(g), silu = g * s, given = grad[i];
            gate_grad[i] = given * up[i] * (s + silu * (1.0f - s));
            up_grad[i] = given * silu;
        }
    });
}

// Turn the first 2 * half channels of x [rows, heads, d] by cos and sin [table_rows, half], row i by that of
// i % table_rows; turn back if `back`. Pairs are channels i and i + half, or 2i and 2i + 1 if `interleaved`.
void turn_heads(int64_t rows, int64_t heads, int64_t d, int64_t half, int64_t table_rows, int64_t interleaved,
                int64_t back, int64_t threads, const float* x, const float* cos, const float* sin, float* y) {
    by_rows(rows, threads, [&](int64_t, int64_t from, int64_t to) {
        std::vector<float> turned(half);
        float* s = turned.data();
        for (int64_t i = from; i < to; i++) {
            const float *c = cos + i % table_rows * half, *given = sin + i % table_rows * half;
            for (int64_t j = 0; j < half; j++) s[j] = back ? -given[j] : given[j];
            for (int64_t h = 0; h < heads; h++) {
                const float* in = x + (i * heads + h) * d;
                float* out = y + (i * heads + h) * d;
                const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
                for (int64_t j = 0; j < half; j++) {
                    const float one = in[step * j], other = in[step * j + apart];
                    out[step * j] = one * c[j] - other * s[j];
                    out[step * j + apart] = other * c[j] + one * s[j];
                }
                std::memcpy(out + 2 * half, in + 2 * half, sizeof(float) * (d - 2 * half));
            }
        }
    });
}

// The cross-entropy of logits [rows, v] and targets [rows], those below 0 aside: losses [rows]. The logits become their
// own gradients.
void cross_entropy(int64_t rows, int64_t v, int64_t threads, float* logits, const int64_t* targets, float* losses) {
    by_rows(rows, threads, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) {
            float* x = logits + i * v;
            if (targets[i] < 0) {
                losses[i] = 0.0f;
                std::memset(x, 0, sizeof(float) * v);
                continue;
            }
            const float shift = largest(x, v), mine = x[targets[i]] - shift;
            const double sum = exponentials(x, v, 1.0f, shift);
            losses[i] = float(std::log(sum) - mine);
            const float factor = float(1 / sum);
            for (int64_t j = 0; j < v; j++) x[j] *= factor;
            x[targets[i]] -= 1.0f;
        }
    });
}

// Every query sees the keys up to its own place: q [batch, s, heads, d], k and v [batch, s, groups, d and dv],
// y [batch, s, heads, dv], logs [batch, heads, s]: the logarithm of each query's sum of exponentials.
void attend_forward(const AttendSizes* sizes, double scale, const float* q, const float* k, const float* v, float* y,
                    float* logs) {  // scale > 0
    const AttendSizes z = *sizes;
    const int64_t ld_q = z.heads * z.d, ld_k = z.groups * z.d, ld_v = z.groups * z.dv, ld_y = z.heads * z.dv;
    share(z.batch * z.heads * blocks(z), z.threads, [&](long item) {
        const long last = blocks(z) - 1 - item % blocks(z);  // the longest first
        const Block b(z, item / blocks(z) / z.heads, item / blocks(z) % z.heads, last);
        const int64_t group = b.head / (z.heads / z.groups), at = b.row * z.s + b.start;
        float *scores = Scratch(widest(z), 1).take(b.m * b.ld), factors[QUERIES];
        product(b.m, b.n, z.d, Left{q + at * ld_q + b.head * z.d, ld_q},
                Right{k + b.row * z.s * ld_k + group * z.d, ld_k, true}, scores, b.ld);
        for (int64_t i = 0; i < b.m; i++) {
            float* x = scores + i * b.ld;
            const int64_t seen = b.start + i + 1;
            const float shift = float(scale) * largest(x, seen);
            const double sum = exponentials(x, seen, float(scale), shift);
            std::fill(x + seen, x + b.n, 0.0f);
            factors[i] = float(1 / sum);
            logs[(b.row * z.heads + b.head) * z.s + b.start + i] = float(shift + std::log(sum));
        }
        float* out = y + at * ld_y + b.head * z.dv;
        weigh(b, scores, v + b.row * z.s * ld_v + group * z.dv, ld_v, z.dv, out, ld_y);
        for (int64_t i = 0; i < b.m; i++)
            for (int64_t j = 0; j < z.dv; j++) out[i * ld_y + j] *= factors[i];
    });
}

// A group's keys and values, with the heads that read them, are one thread's.
void attend_backward(const AttendSizes* sizes, double scale, const float* q, const float* k, const float* v,
                     const float* logs, const float* y_grad, float* q_grad, float* k_grad, float* v_grad) {
    const AttendSizes z = *sizes;
    const int64_t ld_q = z.heads * z.d, ld_k = z.groups * z.d, ld_v = z.groups * z.dv, ld_y = z.heads * z.dv;
    const int64_t members = z.heads / z.groups;
    share(z.batch * z.groups, z.threads, [&](long item) {
        const int64_t row = item / z.groups, group = item % z.groups;
        const int64_t keys = row * z.s * ld_k + group * z.d, values = row * z.s * ld_v + group * z.dv;
        for (int64_t j = 0; j < z.s; j++) {
            std::fill_n(k_grad + keys + j * ld_k, z.d, 0.0f);
            std::fill_n(v_grad + values + j * ld_v, z.dv, 0.0f);
        }
        for (int64_t part = 0; part < members * blocks(z); part++) {
            const Block b(z, row, group * members + part / blocks(z), part % blocks(z));
            const int64_t queries = (row * z.s + b.start) * ld_q + b.head * z.d;
            const float* grad = y_grad + (row * z.s + b.start) * ld_y + b.head * z.dv;
            Scratch scratch(2 * widest(z), 2);
            float *weights = scratch.take(b.m * b.ld), *grads = scratch.take(b.m * b.ld);
            product(b.m, b.n, z.d, Left{q + queries, ld_q}, Right{k + keys, ld_k, true}, weights, b.ld);
            product(b.m, b.n, z.dv, Left{grad, ld_y}, Right{v + values, ld_v, true}, grads, b.ld);
            for (int64_t i = 0; i < b.m; i++) {
                float *x = weights + i * b.ld, *g = grads + i * b.ld;
                const int64_t seen = b.start + i + 1;
                const float log = logs[(row * z.heads + b.head) * z.s + b.start + i];
                for (int64_t j = 0; j < seen; j++) x[j] = exponential(x[j] * float(scale) - log);
                const float along = dot(x, g, seen);
                for (int64_t j = 0; j < seen; j++) g[j] = x[j] * (g[j] - along) * float(scale);
                std::fill(x + seen, x + b.n, 0.0f);
                std::fill(g + seen, g + b.n, 0.0f);
            }
            product(b.n, z.dv, b.m, Left{weights, b.ld, true}, Right{grad, ld_y}, v_grad + values, ld_v, true);
            product(b.n, z.d, b.m, Left{grads, b.ld, true}, Right{q + queries, ld_q}, k_grad + keys, ld_k, true);
            weigh(b, grads, k + keys, ld_k, z.d, q_grad + queries, ld_q);
        }
    });
}
}
