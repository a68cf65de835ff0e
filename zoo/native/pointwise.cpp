// What mixers do with every number by itself, in fp32 on a CPU: the short convolution and the gated norm, each pass over
// memory once, and what backward passes need of it is computed again.
//
// Called by zoo/blocks/compiled_mixers.py. The same by torch: zoo/blocks/conv.py, and the norms of mamba2.py and delta.py.

#include "tiles.h"

using namespace tiles;

namespace {

constexpr int64_t SPAN = 128;  // channels of a convolution that are worked on together

struct ConvSizes {
    int64_t batch, s, channels, width, silu, threads;
    int64_t spans() const { return (channels + SPAN - 1) / SPAN; }
};

// The tokens at a distance of 0, 1 ... from one, as far as it sees: of its row and document.
int64_t reach(const ConvSizes& z, const int64_t* documents, int64_t row, int64_t t) {
    int64_t found = std::min(z.width, t + 1);
    if (documents)
        for (int64_t d = 1; d < found; d++)
            if (documents[row * z.s + t - d] != documents[row * z.s + t]) return d;
    return found;
}

// y [n] = bias + sum of taps [distance, SPAN] times x, that of a distance `row` numbers before.
template <int REACH>
void taps_of(const float* x, int64_t row, const float* taps, const float* bias, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i++) {
        float sum = bias[i];
        for (int d = 0; d < REACH; d++) sum += taps[d * SPAN + i] * x[i - d * row];
        y[i] = sum;
    }
}
void convolve(int64_t reach, const float* x, int64_t row, const float* taps, const float* bias, int64_t n, float* y) {
    switch (reach) {
        case 1: return taps_of<1>(x, row, taps, bias, n, y);
        case 2: return taps_of<2>(x, row, taps, bias, n, y);
        case 3: return taps_of<3>(x, row, taps, bias, n, y);
        default: taps_of<4>(x, row, taps, bias, n, y);
    }
    for (int64_t d = 4; d < reach; d++)
        for (int64_t i = 0; i < n; i++) y[i] += taps[d * SPAN + i] * x[i - d * row];
}

// Taps and bias of some channels, from weight [channels, width], that of the token itself first.
struct Taps {
    std::vector<float> taps;
    float bias[SPAN];
    Taps(const ConvSizes& z, const float* weight, const float* given, int64_t first, int64_t n) : taps(z.width * SPAN) {
        for (int64_t i = 0; i < n; i++) {
            bias[i] = given ? given[first + i] : 0.0f;
            for (int64_t d = 0; d < z.width; d++) taps[d * SPAN + i] = weight[(first + i) * z.width + z.width - 1 - d];
        }
    }
};

struct NormSizes {
    int64_t rows, spans, width;  // a row has `spans` parts of `width` numbers, each normed by itself
    int64_t shared;              // the weight is [width], the same for all spans; else [spans, width]
    int64_t sigmoid;             // the gate's activation; else silu
    int64_t gate_last;           // norm, then gate; else the other way round
    int64_t threads;
};

struct UnitSizes {
    int64_t batch, s, heads, width, x_batch, x_row;  // numbers between rows of the batch, and between tokens
    int64_t scaled;                                  // the first heads, which are multiplied with a factor
    int64_t threads;
};

float opened(const NormSizes& z, float gate) { return z.sigmoid ? sigmoid(gate) : gate * sigmoid(gate); }

}  // namespace

extern "C" {

// x and y [batch, s, channels], weight [channels, width], bias [channels] or null.
void conv_forward(const ConvSizes* z, const float* x, const float* weight, const float* bias, const int64_t* documents,
                  float* y) {
    const int64_t pieces = (z->s + SPAN - 1) / SPAN;
    share(z->batch * pieces * z->spans(), z->threads, [&](long item) {
        const int64_t first = item % z->spans() * SPAN, n = std::min(SPAN, z->channels - first);
        const int64_t piece = item / z->spans() % pieces, row = item / z->spans() / pieces;
        const Taps mine(*z, weight, bias, first, n);
        for (int64_t t = piece * SPAN; t < std::min(z->s, (piece + 1) * SPAN); t++) {
            const int64_t place = (row * z->s + t) * z->channels + first;
            convolve(reach(*z, documents, row, t), x + place, z->channels, mine.taps.data(), mine.bias, n, y + place);
            if (z->silu)
                for (int64_t i = 0; i < n; i++) y[place + i] *= sigmoid(y[place + i]);
        }
    });
}

// weight_grad [batch, channels, width] and bias_grad [batch, channels], or null: parts to be added up.
void conv_backward(const ConvSizes* z, const float* x, const float* weight, const float* bias, const int64_t* documents,
                   const float* y_grad, float* x_grad, float* weight_grad, float* bias_grad) {
    share(z->batch * z->spans(), z->threads, [&](long item) {
        const int64_t first = item % z->spans() * SPAN, n = std::min(SPAN, z->channels - first);
        const int64_t row = item / z->spans();
        const Taps mine(*z, weight, bias, first, n);
        std::vector<float> sums((z->width + 1) * SPAN);
        float *bias_sums = sums.data() + z->width * SPAN, grad[SPAN];
        for (int64_t t = 0; t < z->s; t++) {
            const int64_t place = (row * z->s + t) * z->channels + first, seen = reach(*z, documents, row, t);
            if (z->silu) {
                convolve(seen, x + place, z->channels, mine.taps.data(), mine.bias, n, grad);
                for (int64_t i = 0; i < n; i++) {
                    const float open = sigmoid(grad[i]);
                    grad[i] = y_grad[place + i] * open * (1.0f + grad[i] * (1.0f - open));
                }
            } else
                std::memcpy(grad, y_grad + place, sizeof(float) * n);
            for (int64_t i = 0; i < n; i++) bias_sums[i] += grad[i];
            for (int64_t d = 0; d < seen; d++) {
                const float *taps = mine.taps.data() + d * SPAN, *from = x + place - d * z->channels;
                float *to = x_grad + place - d * z->channels, *sum = sums.data() + d * SPAN;
                if (d == 0)
                    for (int64_t i = 0; i < n; i++) to[i] = grad[i] * taps[i];
                else
                    for (int64_t i = 0; i < n; i++) to[i] += grad[i] * taps[i];
                for (int64_t i = 0; i < n; i++) sum[i] += grad[i] * from[i];
            }
        }
        for (int64_t i = 0; i < n; i++) {
            float* to = weight_grad + (row * z->channels + first + i) * z->width;
            for (int64_t d = 0; d < z->width; d++) to[z->width - 1 - d] = sums[d * SPAN + i];
            if (bias_grad) bias_grad[row * z->channels + first + i] = bias_sums[i];
        }
    });
}

// x, gate and y [rows, spans, width].
void gated_norm_forward(const NormSizes* z, const float* x, const float* gate, const float* weight, double eps,
                        float* y) {
    share(z->threads, z->threads, [&](long part) {
        for (int64_t at = z->rows * part / z->threads; at < z->rows * (part + 1) / z->threads; at++)
            for (int64_t span = 0; span < z->spans; span++) {
                const int64_t place = (at * z->spans + span) * z->width;
                const float *in = x + place, *gates = gate + place, *w = weight + (z->shared ? 0 : span * z->width);
                float* to = y + place;
                for (int64_t i = 0; i < z->width; i++) to[i] = z->gate_last ? in[i] : in[i] * opened(*z, gates[i]);
                const float factor = float(1 / std::sqrt(dot(to, to, z->width) / double(z->width) + eps));
                if (z->gate_last)
                    for (int64_t i = 0; i < z->width; i++) to[i] *= factor * w[i] * opened(*z, gates[i]);
                else
                    for (int64_t i = 0; i < z->width; i++) to[i] *= factor * w[i];
            }
    });
}

// weight_grad: [threads, shared ? width : spans * width], parts to be added up.
void gated_norm_backward(const NormSizes* z, const float* x, const float* gate, const float* weight, double eps,
                         const float* y_grad, float* x_grad, float* gate_grad, float* weight_grad) {
    const int64_t total = z->shared ? z->width : z->spans * z->width;
    share(z->threads, z->threads, [&](long part) {
        float* sums = weight_grad + part * total;
        std::fill(sums, sums + total, 0.0f);
        std::vector<float> memory(4 * z->width);
        float *v = memory.data(), *open = v + z->width, *slope = open + z->width, *g = slope + z->width;
        for (int64_t at = z->rows * part / z->threads; at < z->rows * (part + 1) / z->threads; at++)
            for (int64_t span = 0; span < z->spans; span++) {
                const int64_t place = (at * z->spans + span) * z->width, mine = z->shared ? 0 : span * z->width;
                const float *in = x + place, *gates = gate + place, *w = weight + mine, *grad = y_grad + place;
                float *to = x_grad + place, *to_gate = gate_grad + place;
                for (int64_t i = 0; i < z->width; i++) {
                    const float s = sigmoid(gates[i]);
                    open[i] = z->sigmoid ? s : gates[i] * s;
                    slope[i] = z->sigmoid ? s * (1 - s) : s * (1 + gates[i] * (1 - s));
                    v[i] = z->gate_last ? in[i] : in[i] * open[i];
                }
                const float factor = float(1 / std::sqrt(dot(v, v, z->width) / double(z->width) + eps));
                for (int64_t i = 0; i < z->width; i++) {
                    const float closed = z->gate_last ? grad[i] * open[i] : grad[i];
                    g[i] = closed * w[i];
                    sums[mine + i] += closed * v[i] * factor;
                }
                const float along = dot(g, v, z->width) * factor * factor / z->width;
                if (z->gate_last)
                    for (int64_t i = 0; i < z->width; i++) {
                        to_gate[i] = grad[i] * w[i] * v[i] * factor * slope[i];
                        to[i] = factor * (g[i] - v[i] * along);
                    }
                else
                    for (int64_t i = 0; i < z->width; i++) {
                        const float inner = factor * (g[i] - v[i] * along);
                        to_gate[i] = inner * in[i] * slope[i];
                        to[i] = inner * open[i];
                    }
            }
    });
}

// y [batch, s, heads, width] = x / its length over each head.
void unit_forward(const UnitSizes* z, const float* x, double eps, double scale, float* y) {
    share(z->threads, z->threads, [&](long part) {
        const int64_t tokens = z->batch * z->s;
        for (int64_t at = tokens * part / z->threads; at < tokens * (part + 1) / z->threads; at++)
            for (int64_t h = 0; h < z->heads; h++) {
                const float* in = x + at / z->s * z->x_batch + at % z->s * z->x_row + h * z->width;
                float* to = y + (at * z->heads + h) * z->width;
                const double factor = (h < z->scaled ? scale : 1) / std::sqrt(dot(in, in, z->width) + eps);
                for (int64_t i = 0; i < z->width; i++) to[i] = in[i] * float(factor);
            }
    });
}

// x_grad [batch, s, heads, width].
void unit_backward(const UnitSizes* z, const float* x, double eps, double scale, const float* y_grad, float* x_grad) {
    share(z->threads, z->threads, [&](long part) {
        const int64_t tokens = z->batch * z->s;
        for (int64_t at = tokens * part / z->threads; at < tokens * (part + 1) / z->threads; at++)
            for (int64_t h = 0; h < z->heads; h++) {
                const int64_t place = (at * z->heads + h) * z->width;
                const float* in = x + at / z->s * z->x_batch + at % z->s * z->x_row + h * z->width;
                const float *grad = y_grad + place;
                const double square = dot(in, in, z->width) + eps;
                const float factor = float((h < z->scaled ? scale : 1) / std::sqrt(square));
                const float along = float(dot(grad, in, z->width) / square);
                for (int64_t i = 0; i < z->width; i++) x_grad[place + i] = factor * (grad[i] - in[i] * along);
            }
    });
}
}
