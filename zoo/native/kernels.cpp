// Kernels for few tokens: matrices are read once, at the speed of memory, and multiplied in fp32 whatever they are
// stored in. A program is a list of calls; one team of threads runs it through, so that a call costs a barrier, not a
// start of threads. The structs are mirrored in calls.py, field by field; every field has 8 bytes.
//
// Letters: b rows (tokens), d width of the input, n of the output, h heads, g groups of keys, e experts, c choices.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
using tiles::exponential, tiles::sigmoid;

constexpr int64_t PREFETCH = 1024;  // bytes ahead: what hides the latency of memory (measured)
constexpr int TOGETHER = 8;         // rows that pass a matrix together

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

enum Dtype : int64_t { FP32, BF16 };
enum NormType : int64_t { NO_NORM, RMS, LAYER };
enum Mask : int64_t { CAUSAL, SLIDING, CHUNKED };
enum Squash : int64_t { NONE, SIGMOID, SOFTPLUS };
enum Score : int64_t { SOFTMAX, SIGMOID_SCORE, SQRT_SOFTPLUS };
enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SWISH, CLAMPED_SILU, SILU_CLAMPED, SITU };

struct Team {
    int rank, size;
    void wait() const {
#pragma omp barrier
    }
    void share(int64_t total, int64_t& begin, int64_t& end) const {
        begin = total * rank / size, end = total * (rank + 1) / size;
    }
};

// ---- numbers

static inline float number(float x) { return x; }
static inline float number(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline void store(float* place, float x) { *place = x; }
static inline void store(bf16* place, float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *place = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float at(const void* tensor, int64_t dtype, int64_t index) {
    return dtype == BF16 ? number(((const bf16*)tensor)[index]) : ((const float*)tensor)[index];
}

static inline Vec load(const float* place) {
    Vec v;
    memcpy(&v, place, sizeof v);
    return v;
}
static inline Vec load(const bf16* place) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)place)), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)place)), 16);
#else
    Halves h;
    memcpy(&h, place, sizeof h);
    return (Vec)(__builtin_convertvector(h, Bits) << 16);
#endif
}
static inline float sum(Vec v) {
    float parts[LANES];
    memcpy(parts, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    return parts[0];
}

static inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }
static inline float clamp(float x, float limit) { return std::min(std::max(x, -limit), limit); }
static float squash(int64_t kind, float x) { return kind == SIGMOID ? sigmoid(x) : kind == SOFTPLUS ? softplus(x) : x; }

static float activate(int64_t kind, float gate, float up, float limit) {  // ungated: up is 1
    switch (kind) {
        case SILU: return gate * sigmoid(gate) * up;
        case GELU: return 0.5f * gate * (1 + std::erf(gate * 0.70710678f)) * up;
        case GELU_TANH: {
            float inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
            return 0.5f * gate * (1 + std::tanh(inner)) * up;
        }
        case RELU: return std::max(gate, 0.0f) * up;
        case RELU2: return gate > 0 ? gate * gate * up : 0.0f;
        case CLAMPED_SWISH:
            gate = std::min(gate, limit);
            return (clamp(up, limit) + 1) * gate * sigmoid(1.702f * gate);
        case CLAMPED_SILU:
            gate = std::min(gate, limit);
            return gate * sigmoid(gate) * clamp(up, limit);
        case SILU_CLAMPED: return std::min(gate * sigmoid(gate), limit) * clamp(up, limit);
        default: return 4 * std::tanh(gate / 4) * sigmoid(gate) * 25 * std::tanh(up / 25);
    }
}

// ---- a row of a matrix against the inputs of B tokens, U vectors at a time

template <class T, int B, int U>
static inline __attribute__((always_inline)) void dots(const T* w, int64_t d, const float* const* x, float* y) {
    Vec sums[B][U];
    for (int b = 0; b < B; b++)
        for (int u = 0; u < U; u++) sums[b][u] = Vec{};
    int64_t i = 0;
    for (; i + U * LANES <= d; i += U * LANES) {
        for (int64_t line = 0; line < int64_t(U * LANES * sizeof(T)); line += 64)
            __builtin_prefetch((const char*)(w + i) + PREFETCH + line);
#pragma GCC unroll 8
        for (int u = 0; u < U; u++) {
            Vec v = load(w + i + u * LANES);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) sums[b][u] += v * load(x[b] + i + u * LANES);
        }
    }
    for (int b = 0; b < B; b++) {
        for (int u = 1; u < U; u++) sums[b][0] += sums[b][u];
        y[b] = sum(sums[b][0]);
    }
    for (; i < d; i++)
        for (int b = 0; b < B; b++) y[b] += number(w[i]) * x[b][i];
}

template <class T>
static void dots(const T* w, int64_t d, const float* const* x, int64_t rows, float* y) {
    switch (rows) {
        case 1: return dots<T, 1, 8>(w, d, x, y);
        case 2: return dots<T, 2, 4>(w, d, x, y);
        case 3: return dots<T, 3, 2>(w, d, x, y);
        case 4: return dots<T, 4, 2>(w, d, x, y);
        case 5: return dots<T, 5, 2>(w, d, x, y);
        case 6: return dots<T, 6, 1>(w, d, x, y);
        case 7: return dots<T, 7, 1>(w, d, x, y);
        default: return dots<T, 8, 1>(w, d, x, y);
    }
}

struct Matrix {
    const void *weight, *bias;  // [n, d], [n] or null
    int64_t n, d, dtype;
    // One output of `rows` at most TOGETHER tokens.
    void row(int64_t j, const float* const* x, int64_t rows, float* y) const {
        if (dtype == BF16)
            dots((const bf16*)weight + j * d, d, x, rows, y);
        else
            dots((const float*)weight + j * d, d, x, rows, y);
    }
    float bias_at(int64_t j) const { return bias ? at(bias, dtype, j) : 0.0f; }
    Matrix of(int64_t expert) const {
        int64_t size = dtype == BF16 ? 2 : 4;
        Matrix mine = *this;
        mine.weight = (const char*)weight + expert * stride * size;
        if (bias) mine.bias = (const char*)bias + expert * bias_stride * size;
        return mine;
    }
    int64_t stride, bias_stride;  // numbers from one expert to the next
};

// ---- calls

struct Norm {
    int64_t type, width;
    const float *weight, *bias;
    double eps;
    void apply(const float* x, float* y) const {
        double mean = 0, square = 0;
        if (type == LAYER) {
            for (int64_t i = 0; i < width; i++) mean += x[i];
            mean /= width;
        }
        for (int64_t i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
        float factor = float(1 / std::sqrt(square / width + eps)), middle = float(mean);
        for (int64_t i = 0; i < width; i++) y[i] = (x[i] - middle) * factor * (weight ? weight[i] : 1.0f);
        if (bias)
            for (int64_t i = 0; i < width; i++) y[i] += bias[i];
    }
};

struct NormCall {
    Norm norm;
    const float* x;
    float* y;
    int64_t rows;
};
extern "C" void zoo_norm(const NormCall* c, Team team) {
    int64_t begin, end;
    team.share(c->rows, begin, end);
    for (int64_t b = begin; b < end; b++) c->norm.apply(c->x + b * c->norm.width, c->y + b * c->norm.width);
}

struct AddCall {  // x = (x + scale * branch * opening) * factor
    float* x;
    const float *branch, *opening;  // opening: [b], or null
    double scale, factor;
    int64_t rows, width;
};
extern "C" void zoo_add(const AddCall* c, Team team) {
    int64_t begin, end;
    team.share(c->rows, begin, end);
    for (int64_t b = begin; b < end; b++) {
        float scale = float(c->scale) * (c->opening ? c->opening[b] : 1.0f), factor = float(c->factor);
        float* x = c->x + b * c->width;
        const float* branch = c->branch + b * c->width;
        for (int64_t i = 0; i < c->width; i++) x[i] = (x[i] + scale * branch[i]) * factor;
    }
}

struct ProductCall {  // y [b, n] = squash(x [b, d] W^T + bias)
    Matrix matrix;
    const float* x;
    float* y;
    int64_t rows, squash;
};
extern "C" void zoo_product(const ProductCall* c, Team team) {
    const Matrix& m = c->matrix;
    int64_t begin, end;
    team.share(m.n, begin, end);
    for (int64_t first = 0; first < c->rows; first += TOGETHER) {
        int64_t rows = std::min<int64_t>(TOGETHER, c->rows - first);
        const float* x[TOGETHER];
        float y[TOGETHER];
        for (int64_t b = 0; b < rows; b++) x[b] = c->x + (first + b) * m.d;
        for (int64_t j = begin; j < end; j++) {
            m.row(j, x, rows, y);
            float bias = m.bias_at(j);
            for (int64_t b = 0; b < rows; b++) c->y[(first + b) * m.n + j] = squash(c->squash, y[b] + bias);
        }
    }
}

struct RouteCall {  // a rule of `TopKRouterSpec`: logits [b, e] -> weights, indices [b, c]
    const float *logits, *correction, *expert_scale;
    float* weights;
    int64_t* indices;
    int64_t rows, experts, choices, score, score_chosen, normalize, groups, top_groups, group_by_max;
    double normalize_eps, route_scale;
};
static void scores_of(int64_t rule, const float* logits, int64_t n, float* scores) {
    if (rule == SOFTMAX) {
        float most = *std::max_element(logits, logits + n), total = 0;
        for (int64_t i = 0; i < n; i++) total += scores[i] = std::exp(logits[i] - most);
        for (int64_t i = 0; i < n; i++) scores[i] /= total;
    } else {
        for (int64_t i = 0; i < n; i++)
            scores[i] = rule == SIGMOID_SCORE ? 1.0f / (1.0f + std::exp(-logits[i]))
                                              : std::sqrt(std::max(softplus(logits[i]), 1.17549435e-38f));
    }
}
static int64_t take_best(float* merit, int64_t n) {  // and strike it out
    int64_t best = std::max_element(merit, merit + n) - merit;
    merit[best] = -INFINITY;
    return best;
}
static void close_groups(const RouteCall* c, float* merit) {
    int64_t size = c->experts / c->groups;
    std::vector<float> good(c->groups);
    for (int64_t g = 0; g < c->groups; g++) {
        std::vector<float> mine(merit + g * size, merit + (g + 1) * size);
        float first = merit[g * size + take_best(mine.data(), size)];
        good[g] = c->group_by_max ? first : first + *std::max_element(mine.begin(), mine.end());
    }
    std::vector<bool> open(c->groups);
    for (int64_t i = 0; i < c->top_groups; i++) open[take_best(good.data(), c->groups)] = true;
    for (int64_t i = 0; i < c->experts; i++)
        if (!open[i / size]) merit[i] = -INFINITY;
}
extern "C" void zoo_route(const RouteCall* c, Team team) {
    int64_t begin, end;
    team.share(c->rows, begin, end);
    std::vector<float> scores(c->experts), merit(c->experts), chosen(c->choices);
    for (int64_t b = begin; b < end; b++) {
        const float* logits = c->logits + b * c->experts;
        float* weights = c->weights + b * c->choices;
        int64_t* indices = c->indices + b * c->choices;
        if (c->score_chosen)
            std::copy(logits, logits + c->experts, merit.begin());
        else {
            scores_of(c->score, logits, c->experts, scores.data());
            for (int64_t i = 0; i < c->experts; i++) merit[i] = scores[i] + (c->correction ? c->correction[i] : 0.0f);
            if (c->groups > 1) close_groups(c, merit.data());
        }
        for (int64_t i = 0; i < c->choices; i++) indices[i] = take_best(merit.data(), c->experts);
        for (int64_t i = 0; i < c->choices; i++) chosen[i] = (c->score_chosen ? logits : scores.data())[indices[i]];
        if (c->score_chosen) scores_of(c->score, chosen.data(), c->choices, chosen.data());
        float total = float(c->normalize_eps);
        for (float weight : chosen) total += weight;
        for (int64_t i = 0; i < c->choices; i++) {
            weights[i] = (c->normalize ? chosen[i] / total : chosen[i]) * float(c->route_scale);
            if (c->expert_scale) weights[i] *= c->expert_scale[indices[i]];
        }
    }
}

struct FeedCall {  // MLPs: y [b, d_out] = sum over c of weights * down(activate(gate x, up x)); all experts of one shape
    Matrix gate, up, down;  // gate.weight null: ungated
    const float* x;
    const float* weights;    // [b, c], or null: 1
    const int64_t* indices;  // [b, c], or null: one MLP that every token passes
    float *hidden, *y;       // [b * c, f]; [b, d_out]
    int64_t rows, choices, activation, weigh_input;
    double limit;
};
// The choices, those of one expert together: at most TOGETHER of them a piece.
struct Piece {
    int64_t expert, size, choice[TOGETHER];
};
static std::vector<Piece> pieces_of(const FeedCall* c) {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < c->rows * c->choices; i++) {
        int64_t expert = c->indices ? c->indices[i] : 0;
        auto piece = std::find_if(pieces.rbegin(), pieces.rend(), [&](const Piece& p) { return p.expert == expert; });
        if (piece == pieces.rend() || piece->size == TOGETHER) {
            pieces.push_back({expert, 1, {i}});
        } else
            piece->choice[piece->size++] = i;
    }
    return pieces;
}
static void feed_first(const FeedCall* c, const Piece& p, int64_t begin, int64_t end) {
    Matrix gate = c->gate.of(p.expert), up = c->up.of(p.expert);
    const float* x[TOGETHER];
    float opened[TOGETHER], held[TOGETHER];
    for (int64_t i = 0; i < p.size; i++) x[i] = c->x + p.choice[i] / c->choices * up.d;
    for (int64_t j = begin; j < end; j++) {
        up.row(j, x, p.size, held);
        if (c->gate.weight) gate.row(j, x, p.size, opened);
        for (int64_t i = 0; i < p.size; i++) {
            float scale = c->weigh_input ? c->weights[p.choice[i]] : 1.0f, value = held[i] * scale + up.bias_at(j);
            c->hidden[p.choice[i] * up.n + j] =
                c->gate.weight
                    ? activate(c->activation, opened[i] * scale + gate.bias_at(j), value, float(c->limit))
                    : activate(c->activation, value, 1.0f, float(c->limit));
        }
    }
}
static void feed_second(const FeedCall* c, const Piece& p, int64_t begin, int64_t end) {
    Matrix down = c->down.of(p.expert);
    const float* x[TOGETHER];
    float y[TOGETHER];
    for (int64_t i = 0; i < p.size; i++) x[i] = c->hidden + p.choice[i] * down.d;
    for (int64_t j = begin; j < end; j++) {
        down.row(j, x, p.size, y);
        for (int64_t i = 0; i < p.size; i++) {
            float scale = c->weights && !c->weigh_input ? c->weights[p.choice[i]] : 1.0f;
            c->y[p.choice[i] / c->choices * down.n + j] += scale * (y[i] + down.bias_at(j));
        }
    }
}
extern "C" void zoo_feed(const FeedCall* c, Team team) {
    std::vector<Piece> pieces = pieces_of(c);
    int64_t width = c->up.n, begin, end;
    team.share(width * int64_t(pieces.size()), begin, end);  // whole pieces before parts: memory is read in long runs
    for (int64_t i = 0; i < int64_t(pieces.size()); i++)
        feed_first(c, pieces[i], std::max(begin - i * width, int64_t(0)), std::min(end - i * width, width));
    team.share(c->down.n, begin, end);  // here a thread owns outputs, which all experts add to
    for (int64_t b = 0; b < c->rows; b++) std::fill(c->y + b * c->down.n + begin, c->y + b * c->down.n + end, 0.0f);
    team.wait();
    for (const Piece& piece : pieces) feed_second(c, piece, begin, end);
}

struct PassInfo {  // what changes from token to token
    int64_t past;
    const int64_t* padding;  // [b], or null
    int64_t position(int64_t b) const { return std::max<int64_t>(0, past - (padding ? padding[b] : 0)); }
};

struct AttendCall {
    const PassInfo* pass;
    float *q, *k, *v;  // [b, h, d], [b, g, d], [b, g, dv]; changed in place
    const float* gate;  // [b, gate_width] after its squashing, or null
    float *scores, *y;  // [b * h, capacity]; [b, h, dv]
    void *keys, *values;  // [b, capacity, g, d], [b, capacity, g, dv]
    const float *cos, *sin, *sink;  // tables [positions, half]; sink [h] or null
    Norm q_norm, k_norm, v_norm;
    int64_t rows, heads, groups, d, dv, gate_width, capacity, length, cache_dtype, table_start, half, interleaved;
    int64_t norm_after_rope, mask, window, shared_kv;
    double scale, softcap, clip, value_scale, query_beta, query_context, query_shift;
};
static void norm_heads(const Norm& norm, float* x, int64_t total) {
    if (norm.type != NO_NORM)
        for (int64_t i = 0; i < total; i += norm.width) norm.apply(x + i, x + i);
}
static void turn(const AttendCall* c, float* x, int64_t heads, int64_t position) {
    const float* cos = c->cos + (position - c->table_start) * c->half;
    const float* sin = c->sin + (position - c->table_start) * c->half;
    int64_t step = c->interleaved ? 2 : 1, apart = c->interleaved ? 1 : c->half;
    for (int64_t h = 0; h < heads; h++, x += c->d)
        for (int64_t i = 0; i < c->half; i++) {
            float first = x[i * step], second = x[i * step + apart];
            x[i * step] = first * cos[i] - second * sin[i];
            x[i * step + apart] = second * cos[i] + first * sin[i];
        }
}
static void place_heads(const AttendCall* c, const Norm& norm, float* x, int64_t heads, int64_t position) {
    if (!c->norm_after_rope) norm_heads(norm, x, heads * c->d);
    if (c->half) turn(c, x, heads, position);
    if (c->norm_after_rope) norm_heads(norm, x, heads * c->d);
}
template <class T>
static void remember(const float* x, int64_t width, void* cache, int64_t slot) {
    for (int64_t i = 0; i < width; i++) store((T*)cache + slot * width + i, x[i]);
}
static void prepare(const AttendCall* c, int64_t b) {
    int64_t widths[] = {c->heads * c->d, c->groups * c->d, c->groups * c->dv}, position = c->pass->position(b);
    float *q = c->q + b * widths[0], *k = c->k + b * widths[1], *v = c->v + b * widths[2];
    if (c->shared_kv) std::copy(k, k + widths[1], v);
    if (c->clip > 0) {
        float* parts[] = {q, k, v};
        for (int p = 0; p < 3; p++)
            for (int64_t i = 0; i < widths[p]; i++) parts[p][i] = clamp(parts[p][i], float(c->clip));
    }
    norm_heads(c->v_norm, v, widths[2]);
    for (int64_t i = 0; i < widths[2]; i++) v[i] *= float(c->value_scale);
    place_heads(c, c->q_norm, q, c->heads, position);
    place_heads(c, c->k_norm, k, c->groups, position);
    float scale = float(c->scale);
    if (c->query_context > 0) {
        double steps = std::floor((position + c->query_shift) / c->query_context);
        scale *= float(1 + c->query_beta * std::log1p(steps));
    }
    for (int64_t i = 0; i < widths[0]; i++) q[i] *= scale;
    int64_t slot = b * c->capacity + c->length;
    auto keep = c->cache_dtype == BF16 ? remember<bf16> : remember<float>;
    keep(k, widths[1], c->keys, slot);
    keep(v, widths[2], c->values, slot);
}
static int64_t first_visible(const AttendCall* c, int64_t b) {  // its slot in the cache
    int64_t past = c->pass->past, pad = c->pass->padding ? c->pass->padding[b] : 0, first = pad;
    if (c->mask == SLIDING) first = std::max(pad, past - c->window + 1);
    if (c->mask == CHUNKED) first = pad + (past - pad) / c->window * c->window;
    return std::max<int64_t>(0, first - (past - c->length));
}
template <class T>
static void attend(const AttendCall* c, int64_t b, int64_t group, int64_t head) {
    int64_t first = first_visible(c, b), n = c->length + 1 - first;
    const T* keys = (const T*)c->keys + ((b * c->capacity + first) * c->groups + group) * c->d;
    const T* values = (const T*)c->values + ((b * c->capacity + first) * c->groups + group) * c->dv;
    float *scores = c->scores + (b * c->heads + head) * c->capacity, *y = c->y + (b * c->heads + head) * c->dv;
    const float* q = c->q + (b * c->heads + head) * c->d;
    float most = c->sink ? c->sink[head] : -INFINITY, total = 0;
    for (int64_t i = 0; i < n; i++) {
        float score;
        dots<T, 1, 2>(keys + i * c->groups * c->d, c->d, &q, &score);
        if (c->softcap > 0) score = float(c->softcap * std::tanh(score / c->softcap));
        most = std::max(most, scores[i] = score);
    }
    for (int64_t i = 0; i < n; i++) scores[i] = exponential(scores[i] - most);
    for (int64_t i = 0; i < n; i++) total += scores[i];
    if (c->sink) total += exponential(c->sink[head] - most);
    std::fill(y, y + c->dv, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        float weight = scores[i] / total;
        const T* value = values + i * c->groups * c->dv;
        for (int64_t j = 0; j < c->dv; j++) y[j] += weight * number(value[j]);
    }
    if (c->gate) {
        int64_t span = c->gate_width / c->heads;  // one number for a head, or for each of its channels
        const float* gate = c->gate + b * c->gate_width + head * span;
        for (int64_t j = 0; j < c->dv; j++) y[j] *= gate[span == 1 ? 0 : j];
    }
}
extern "C" void zoo_attend(const AttendCall* c, Team team) {
    int64_t begin, end, group_size = c->heads / c->groups;
    team.share(c->rows, begin, end);
    for (int64_t b = begin; b < end; b++) prepare(c, b);
    team.wait();
    team.share(c->rows * c->heads, begin, end);  // heads of a group stay together: their keys are in the cache
    auto run = c->cache_dtype == BF16 ? attend<bf16> : attend<float>;
    for (int64_t i = begin; i < end; i++) run(c, i / c->heads, i % c->heads / group_size, i % c->heads);
}

// ---- programs

struct Call {
    void (*run)(const void* arguments, Team team);
    const void* arguments;
    int64_t wait;  // whether later calls need what this one makes
};
extern "C" void zoo_run(const Call* calls, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        Team team{omp_get_thread_num(), omp_get_num_threads()};
#else
        Team team{0, 1};
#endif
        for (int64_t i = 0; i < count; i++) {
            calls[i].run(calls[i].arguments, team);
            if (calls[i].wait) team.wait();
        }
    }
}
extern "C" {
extern const int64_t zoo_sizes[] = {sizeof(NormCall),  sizeof(AddCall),    sizeof(ProductCall), sizeof(RouteCall),
                                    sizeof(FeedCall),  sizeof(AttendCall), sizeof(PassInfo),    sizeof(Call)};
}
