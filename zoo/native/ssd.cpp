// The recurrence of Mamba-2 over whole sequences, in fp32 on a CPU: chunk by chunk, each head's matrices in the cache.
//
// Called by zoo/blocks/native_mixers.py. What is computed, and the letters: zoo/blocks/ssd.py, which does the same
// arithmetic by torch. Here a state is [n, p], and a chunk's b and c are [n, l]: so no product has to turn a large factor.

#include "tiles.h"

using namespace tiles;

namespace {

struct Sizes {
    int64_t batch, s, heads, p, groups, n, chunk;
    int64_t blocks;  // parts of a group's heads that threads take
    int64_t x_batch, x_row, b_batch, b_row, c_batch, c_row;  // numbers between rows of the batch, and between tokens
    int64_t threads;
    int64_t items() const { return batch * groups * blocks; }
    int64_t chunks() const { return (s + chunk - 1) / chunk; }
};

// What one thread works on: some heads of a group.
struct Item {
    const Sizes& z;
    int64_t batch, group, block, first, last, ld, ldp;
    Item(const Sizes& sizes, int64_t index) : z(sizes) {
        block = index % z.blocks, group = index / z.blocks % z.groups, batch = index / z.blocks / z.groups;
        const int64_t width = z.heads / z.groups;
        first = group * width + width * block / z.blocks, last = group * width + width * (block + 1) / z.blocks;
        ld = z.chunk + SPARE, ldp = z.p + SPARE;
    }
    int64_t length(int64_t chunk) const { return std::min(z.chunk, z.s - chunk * z.chunk); }
    int64_t token(int64_t chunk) const { return batch * z.s + chunk * z.chunk; }
};

struct Inputs {
    const float *x, *dt, *a, *b, *c, *start;
    const int64_t* documents;
};

// b or c of a chunk, turned.
void turn_shared(const Item& it, const float* from, int64_t row, int64_t l, float* to) {
    turn(l, it.z.n, from, row, to, it.ld);
}

// What a head has of a chunk.
struct Head {
    const Item& it;
    const Inputs& in;
    int64_t h;
    Decays decays;
    float *dt, *xs, *xw;  // [l]; dt x, and what is left of it at the end of the chunk: [l, ldp]

    Head(const Item& item, const Inputs& inputs, Scratch& room) : it(item), in(inputs), h(0) {
        const int64_t l = it.z.chunk;
        decays = {l, it.ld, room.take(l * it.ld), room.take(l), room.take(l), 0.0f,
                  reinterpret_cast<double*>(room.take(2 * l))};
        dt = room.take(l), xs = room.take(l * it.ldp), xw = room.take(l * it.ldp);
    }
    static int64_t numbers(const Item& it) { return it.z.chunk * (it.ld + 2 * it.ldp + 5); }
    const float* x(int64_t chunk) const {
        return in.x + it.batch * it.z.x_batch + chunk * it.z.chunk * it.z.x_row + h * it.z.p;
    }
    void read(int64_t chunk) {
        const int64_t l = it.length(chunk), p = it.z.p;
        double total = 0;
        decays.l = l;
        for (int64_t i = 0; i < l; i++) {
            dt[i] = in.dt[(it.token(chunk) + i) * it.z.heads + h];
            decays.sums[i] = total += static_cast<double>(dt[i]) * in.a[h];
        }
        decays.fill(in.documents ? in.documents + it.token(chunk) : nullptr, chunk == 0);
        const float* from = x(chunk);
        for (int64_t i = 0; i < l; i++)
            for (int64_t j = 0; j < p; j++) {
                xs[i * it.ldp + j] = from[i * it.z.x_row + j] * dt[i];
                xw[i * it.ldp + j] = xs[i * it.ldp + j] * decays.to_end[i];
            }
    }
    // state <- whole state + b^T xw
    void advance(const float* b, float* state) const {
        for (int64_t i = 0; i < it.z.n * it.z.p; i++) state[i] *= decays.whole;
        product(it.z.n, it.z.p, decays.l, {b, it.ld}, {xw, it.ldp}, state, it.z.p, true);
    }
};

void scale_rows(int64_t l, int64_t p, const float* factor, float* x, int64_t ld) {
    for (int64_t i = 0; i < l; i++)
        for (int64_t j = 0; j < p; j++) x[i * ld + j] *= factor[i];
}

void multiply_below(int64_t l, const float* factor, float* x, int64_t ld) {
    for (int64_t i = 0; i < l; i++)
        for (int64_t j = 0; j <= i; j++) x[i * ld + j] *= factor[i * ld + j];
}

void forward(const Item& it, const Inputs& in, float* y, float* end) {
    const Sizes& z = it.z;
    const int64_t size = z.n * z.p, heads = it.last - it.first;
    Scratch room(heads * size + 2 * z.n * it.ld + z.chunk * (it.ld + it.ldp) + Head::numbers(it), 12);
    float *states = room.take(heads * size), *b = room.take(z.n * it.ld), *c = room.take(z.n * it.ld);
    float *scores = room.take(z.chunk * it.ld), *found = room.take(z.chunk * it.ldp);
    Head head(it, in, room);
    for (int64_t h = 0; h < heads; h++)
        turn(z.p, z.n, in.start + (it.batch * z.heads + it.first + h) * size, z.n, states + h * size, z.p);
    for (int64_t chunk = 0; chunk < z.chunks(); chunk++) {
        const int64_t l = it.length(chunk), place = chunk * z.chunk;
        turn_shared(it, in.b + it.batch * z.b_batch + place * z.b_row + it.group * z.n, z.b_row, l, b);
        turn_shared(it, in.c + it.batch * z.c_batch + place * z.c_row + it.group * z.n, z.c_row, l, c);
        product(l, l, z.n, {c, it.ld, true}, {b, it.ld}, scores, it.ld, false, BELOW);
        for (int64_t h = it.first; h < it.last; h++) {
            float* state = states + (h - it.first) * size;
            head.h = h;
            head.read(chunk);
            multiply_below(l, scores, head.decays.pairs, it.ld);
            product(l, z.p, z.n, {c, it.ld, true}, {state, z.p}, found, it.ldp);
            scale_rows(l, z.p, head.decays.from_start, found, it.ldp);
            product(l, z.p, l, {head.decays.pairs, it.ld}, {head.xs, it.ldp}, found, it.ldp, true, LOWER);
            for (int64_t i = 0; i < l; i++)
                std::memcpy(y + ((it.token(chunk) + i) * z.heads + h) * z.p, found + i * it.ldp, sizeof(float) * z.p);
            head.advance(b, state);
        }
    }
    for (int64_t h = 0; h < heads; h++)
        turn(z.n, z.p, states + h * size, z.p, end + (it.batch * z.heads + it.first + h) * size, z.n);
}

struct Gradients {
    float *x, *dt, *a, *b, *c, *start;  // a [batch, h]; b and c [blocks, batch, s, g, n]; others as their tensors
};

// Of all chunks, for the heads of an item together.
struct Shared {
    float *b, *c, *b_grad, *c_grad;  // each [chunks, n, ld]
    float *scores, *scores_grad;     // each [chunks, chunk, ld]
};

// The gradients of a head in one chunk, from that of its results y_grad; those of `state_grad` move to the chunk's start.
void pull_back(Head& head, const Shared& all, int64_t chunk, const float* y_grad, const float* state, float* state_grad,
               const Gradients& grads, double& a_grad, Scratch room) {
    const Item& it = head.it;
    const Sizes& z = it.z;
    const int64_t l = it.length(chunk), size = z.n * z.p;
    const float *b = all.b + chunk * z.n * it.ld, *c = all.c + chunk * z.n * it.ld;
    const float* scores = all.scores + chunk * z.chunk * it.ld;
    float* scores_grad = all.scores_grad + chunk * z.chunk * it.ld;
    float *arriving = room.take(z.chunk * it.ldp), *gy = room.take(z.chunk * it.ldp);
    float *read = room.take(z.chunk * it.ldp), *inputs = room.take(z.chunk * it.ldp);
    float *pairs_grad = room.take(z.chunk * it.ld), *turned = room.take(z.n * it.ld);
    float *start = room.take(z.chunk), *end = room.take(z.chunk), *log_grad = room.take(z.chunk);
    double* among = reinterpret_cast<double*>(room.take(2 * z.chunk));
    const Decays& d = head.decays;
    for (int64_t i = 0; i < l; i++) {
        const float* from = y_grad + ((it.token(chunk) + i) * z.heads + head.h) * z.p;
        for (int64_t j = 0; j < z.p; j++) {
            gy[i * it.ldp + j] = from[j];
            arriving[i * it.ldp + j] = from[j] * d.from_start[i];
        }
    }
    // What tokens read of the first state.
    product(z.n, l, z.p, {state, z.p}, {arriving, it.ldp, true}, turned, it.ld);
    std::fill(start, start + l, 0.0f);
    float* c_grad = all.c_grad + chunk * z.n * it.ld;
    for (int64_t k = 0; k < z.n; k++)
        for (int64_t i = 0; i < l; i++) {
            c_grad[k * it.ld + i] += turned[k * it.ld + i];
            start[i] += turned[k * it.ld + i] * c[k * it.ld + i];
        }
    // What they write to the last one.
    product(z.n, l, z.p, {state_grad, z.p}, {head.xw, it.ldp, true}, all.b_grad + chunk * z.n * it.ld, it.ld, true);
    product(l, z.p, z.n, {b, it.ld, true}, {state_grad, z.p}, read, it.ldp);
    // What they read of each other.
    product(l, l, z.p, {gy, it.ldp}, {head.xs, it.ldp, true}, pairs_grad, it.ld, false, BELOW);
    for (int64_t i = 0; i < l; i++)
        for (int64_t j = 0; j <= i; j++) {
            const int64_t at = i * it.ld + j;
            pairs_grad[at] *= d.pairs[at];
            scores_grad[at] += pairs_grad[at];
            pairs_grad[at] *= scores[at];
        }
    multiply_below(l, scores, d.pairs, it.ld);
    product(l, z.p, l, {d.pairs, it.ld, true}, {gy, it.ldp}, inputs, it.ldp, false, LOWER_TURNED);
    for (int64_t i = 0; i < l; i++) {
        end[i] = dot(head.xw + i * it.ldp, read + i * it.ldp, z.p);
        for (int64_t j = 0; j < z.p; j++) inputs[i * it.ldp + j] += read[i * it.ldp + j] * d.to_end[i];
    }
    sum_among(l, pairs_grad, it.ld, among);
    const float whole = d.whole == 0 ? 0.0f : d.whole * dot(state_grad, state, size);
    grad_log_decays(l, among, start, end, whole, log_grad);
    const float* x = head.x(chunk);
    for (int64_t i = 0; i < l; i++) {
        const int64_t token = it.token(chunk) + i;
        float* x_grad = grads.x + (token * z.heads + head.h) * z.p;
        grads.dt[token * z.heads + head.h] =
            dot(x + i * z.x_row, inputs + i * it.ldp, z.p) + log_grad[i] * head.in.a[head.h];
        for (int64_t j = 0; j < z.p; j++) x_grad[j] = inputs[i * it.ldp + j] * head.dt[i];
        a_grad += static_cast<double>(log_grad[i]) * head.dt[i];
    }
    for (int64_t i = 0; i < size; i++) state_grad[i] *= d.whole;
    product(z.n, z.p, l, {c, it.ld}, {arriving, it.ldp}, state_grad, z.p, true);
}

void backward(const Item& it, const Inputs& in, const float* y_grad, const float* end_grad, const Gradients& grads) {
    const Sizes& z = it.z;
    const int64_t size = z.n * z.p, wide = z.n * it.ld, square = z.chunk * it.ld, chunks = z.chunks();
    const int64_t one = 4 * z.chunk * it.ldp + square + wide + 5 * z.chunk;
    Scratch room(chunks * (4 * wide + 2 * square + size) + size + one + Head::numbers(it), 30);
    Shared all;
    for (float** part : {&all.b, &all.c, &all.b_grad, &all.c_grad}) *part = room.take(chunks * wide);
    for (float** part : {&all.scores, &all.scores_grad}) *part = room.take(chunks * square);
    float *states = room.take(chunks * size), *state_grad = room.take(size);
    Head head(it, in, room);
    for (float* part : {all.b_grad, all.c_grad}) std::fill(part, part + chunks * wide, 0.0f);
    std::fill(all.scores_grad, all.scores_grad + chunks * square, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t l = it.length(chunk), place = chunk * z.chunk;
        float *b = all.b + chunk * wide, *c = all.c + chunk * wide;
        turn_shared(it, in.b + it.batch * z.b_batch + place * z.b_row + it.group * z.n, z.b_row, l, b);
        turn_shared(it, in.c + it.batch * z.c_batch + place * z.c_row + it.group * z.n, z.c_row, l, c);
        product(l, l, z.n, {c, it.ld, true}, {b, it.ld}, all.scores + chunk * square, it.ld, false, BELOW);
    }
    for (int64_t h = it.first; h < it.last; h++) {
        const int64_t row = it.batch * z.heads + h;
        head.h = h;
        turn(z.p, z.n, in.start + row * size, z.n, states, z.p);
        for (int64_t chunk = 0; chunk + 1 < chunks; chunk++) {
            float* next = states + (chunk + 1) * size;
            head.read(chunk);
            std::memcpy(next, next - size, sizeof(float) * size);
            head.advance(all.b + chunk * wide, next);
        }
        turn(z.p, z.n, end_grad + row * size, z.n, state_grad, z.p);
        double a_grad = 0;
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            head.read(chunk);
            pull_back(head, all, chunk, y_grad, states + chunk * size, state_grad, grads, a_grad, room);
        }
        grads.a[row] = static_cast<float>(a_grad);
        turn(z.n, z.p, state_grad, z.p, grads.start + row * size, z.n);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t l = it.length(chunk), row = z.groups * z.n;
        const Right scores{all.scores_grad + chunk * square, it.ld};
        float *b_grad = all.b_grad + chunk * wide, *c_grad = all.c_grad + chunk * wide;
        product(z.n, l, l, {all.c + chunk * wide, it.ld}, scores, b_grad, it.ld, true);
        product(z.n, l, l, {all.b + chunk * wide, it.ld}, {scores.p, it.ld, true}, c_grad, it.ld, true);
        const int64_t place = ((it.block * z.batch * z.s + it.token(chunk)) * z.groups + it.group) * z.n;
        turn(z.n, l, b_grad, it.ld, grads.b + place, row);
        turn(z.n, l, c_grad, it.ld, grads.c + place, row);
    }
}

}  // namespace

extern "C" {

void ssd_forward(const Sizes* sizes, const float* x, const float* dt, const float* a, const float* b, const float* c,
                 const float* start, const int64_t* documents, float* y, float* end) {
    const Inputs in{x, dt, a, b, c, start, documents};
    share(sizes->items(), sizes->threads, [&](long index) { forward(Item(*sizes, index), in, y, end); });
}

// The gradients of a are [batch, h], those of b and c [blocks, batch, s, g, n]: parts to be added up.
void ssd_backward(const Sizes* sizes, const float* x, const float* dt, const float* a, const float* b, const float* c,
                  const float* start, const int64_t* documents, const float* y_grad, const float* end_grad,
                  float* x_grad, float* dt_grad, float* a_grad, float* b_grad, float* c_grad, float* start_grad) {
    const Inputs in{x, dt, a, b, c, start, documents};
    const Gradients grads{x_grad, dt_grad, a_grad, b_grad, c_grad, start_grad};
    share(sizes->items(), sizes->threads,
          [&](long index) { backward(Item(*sizes, index), in, y_grad, end_grad, grads); });
}
}
