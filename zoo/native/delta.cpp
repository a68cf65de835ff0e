// The gated delta rule with one decay a head over whole sequences, in fp32 on a CPU: chunk by chunk, each head's matrices
// in the cache, a chunk's triangular system solved by substitution.
//
// Called by zoo/blocks/compiled_mixers.py. What is computed, and the letters: zoo/blocks/delta_rule.py, which does the
// same arithmetic by torch. A state is [k, v]; a chunk's queries and keys are [k, l]: no product turns a large factor.
//
// In a chunk, with A_ij = beta_i decay_ij (k_i . k_j) below the diagonal and state S before it:
//     u_i = v_i - from_start_i S^T k_i,   (I + A) new = beta u,   o_i = from_start_i S^T q_i + sum decay_ij (q_i . k_j) new_j

#include "tiles.h"

using namespace tiles;

namespace {

constexpr int64_t BLOCK = 12;  // rows of a triangular system that are solved one by one

struct Sizes {
    int64_t batch, s, heads, groups, k, v, chunk;
    int64_t q_batch, q_row, k_batch, k_row, v_batch, v_row;  // numbers between rows of the batch, and between tokens
    int64_t threads;
    int64_t items() const { return batch * groups; }
    int64_t chunks() const { return (s + chunk - 1) / chunk; }
};

struct Inputs {
    const float *q, *k, *v, *log_decay, *beta, *start;  // log_decay and beta [batch, s, h]
    const int64_t* documents;
};

// What one thread works on: a group of heads, which share queries and keys.
struct Item {
    const Sizes& z;
    int64_t batch, group, first, last, ld, ldv;
    Item(const Sizes& sizes, int64_t index) : z(sizes), batch(index / z.groups), group(index % z.groups) {
        const int64_t width = z.heads / z.groups;
        first = group * width, last = first + width;
        ld = z.chunk + SPARE, ldv = z.v + SPARE;
    }
    int64_t length(int64_t chunk) const { return std::min(z.chunk, z.s - chunk * z.chunk); }
    int64_t token(int64_t chunk) const { return batch * z.s + chunk * z.chunk; }
};

// What all heads of a group have of a chunk: q and k [k, ld]; products of keys and of queries with keys [chunk, ld].
struct Shared {
    float *q, *k, *among_keys, *among_queries;
    static int64_t numbers(const Item& it) { return 2 * (it.z.k + it.z.chunk) * it.ld; }
    Shared(const Item& it, float* memory) : q(memory), k(q + it.z.k * it.ld), among_keys(k + it.z.k * it.ld) {
        among_queries = among_keys + it.z.chunk * it.ld;
    }
    void read(const Item& it, const Inputs& in, int64_t chunk) {
        const Sizes& z = it.z;
        const int64_t l = it.length(chunk), place = chunk * z.chunk;
        turn(l, z.k, in.q + it.batch * z.q_batch + place * z.q_row + it.group * z.k, z.q_row, q, it.ld);
        turn(l, z.k, in.k + it.batch * z.k_batch + place * z.k_row + it.group * z.k, z.k_row, k, it.ld);
        product(l, l, z.k, {k, it.ld, true}, {k, it.ld}, among_keys, it.ld, false, BELOW);
        product(l, l, z.k, {q, it.ld, true}, {k, it.ld}, among_queries, it.ld, false, BELOW);
    }
};

// x [l, v] <- (I - minus)^-1 x, minus [l, ld] below its diagonal.
void solve(int64_t l, int64_t v, const float* minus, int64_t ld, float* x, int64_t ldv) {
    for (int64_t first = 0; first < l; first += BLOCK) {
        const int64_t last = std::min(l, first + BLOCK);
        if (first) product(last - first, v, first, {minus + first * ld, ld}, {x, ldv}, x + first * ldv, ldv, true);
        for (int64_t i = first + 1; i < last; i++)
            for (int64_t j = first; j < i; j++) {
                const float factor = minus[i * ld + j];
                for (int64_t c = 0; c < v; c++) x[i * ldv + c] += factor * x[j * ldv + c];
            }
    }
}

// The same with `minus` turned.
void solve_turned(int64_t l, int64_t v, const float* minus, int64_t ld, float* x, int64_t ldv) {
    for (int64_t first = (l - 1) / BLOCK * BLOCK; first >= 0; first -= BLOCK) {
        const int64_t last = std::min(l, first + BLOCK);
        if (last < l)
            product(last - first, v, l - last, {minus + last * ld + first, ld, true}, {x + last * ldv, ldv},
                    x + first * ldv, ldv, true);
        for (int64_t i = last - 2; i >= first; i--)
            for (int64_t j = i + 1; j < last; j++) {
                const float factor = minus[j * ld + i];
                for (int64_t c = 0; c < v; c++) x[i * ldv + c] += factor * x[j * ldv + c];
            }
    }
}

void scale_rows(int64_t l, int64_t v, const float* factor, const float* x, float* y, int64_t ld) {
    for (int64_t i = 0; i < l; i++)
        for (int64_t j = 0; j < v; j++) y[i * ld + j] = factor[i] * x[i * ld + j];
}

// What a head has of a chunk.
struct Head {
    const Item& it;
    const Inputs& in;
    int64_t h;
    Decays decays;
    float *beta, *minus, *scaled;  // [l]; -A [l, ld]; [l, ldv]

    Head(const Item& item, const Inputs& inputs, Scratch& room) : it(item), in(inputs), h(0) {
        const int64_t l = it.z.chunk;
        decays = {l, it.ld, room.take(l * it.ld), room.take(l), room.take(l), 0.0f,
                  reinterpret_cast<double*>(room.take(2 * l))};
        beta = room.take(l), minus = room.take(l * it.ld), scaled = room.take(l * it.ldv);
    }
    static int64_t numbers(const Item& it) { return it.z.chunk * (2 * it.ld + it.ldv + 5); }
    const float* v(int64_t chunk) const {
        return in.v + it.batch * it.z.v_batch + chunk * it.z.chunk * it.z.v_row + h * it.z.v;
    }
    void read(const Shared& all, int64_t chunk) {
        const int64_t l = it.length(chunk);
        double total = 0;
        decays.l = l;
        for (int64_t i = 0; i < l; i++) {
            const int64_t at = (it.token(chunk) + i) * it.z.heads + h;
            beta[i] = in.beta[at];
            decays.sums[i] = total += static_cast<double>(in.log_decay[at]);
        }
        decays.fill(in.documents ? in.documents + it.token(chunk) : nullptr, chunk == 0);
        for (int64_t i = 0; i < l; i++)
            for (int64_t j = 0; j < i; j++)
                minus[i * it.ld + j] = -beta[i] * decays.pairs[i * it.ld + j] * all.among_keys[i * it.ld + j];
    }
    // u and new [l, ldv] of a chunk that begins with `state`.
    void change(const Shared& all, int64_t chunk, const float* state, float* u, float* changed) const {
        const int64_t l = decays.l;
        product(l, it.z.v, it.z.k, {all.k, it.ld, true}, {state, it.z.v}, u, it.ldv);
        const float* from = v(chunk);
        for (int64_t i = 0; i < l; i++)
            for (int64_t j = 0; j < it.z.v; j++) {
                float& at = u[i * it.ldv + j];
                at = from[i * it.z.v_row + j] - decays.from_start[i] * at;
                changed[i * it.ldv + j] = beta[i] * at;
            }
        solve(l, it.z.v, minus, it.ld, changed, it.ldv);
    }
    // state <- whole state + sum of to_end k new^T
    void advance(const Shared& all, const float* changed, float* state) const {
        scale_rows(decays.l, it.z.v, decays.to_end, changed, scaled, it.ldv);
        for (int64_t i = 0; i < it.z.k * it.z.v; i++) state[i] *= decays.whole;
        product(it.z.k, it.z.v, decays.l, {all.k, it.ld}, {scaled, it.ldv}, state, it.z.v, true);
    }
    // decays <- decays times the products of queries with keys
    void weigh(const Shared& all) {
        for (int64_t i = 0; i < decays.l; i++)
            for (int64_t j = 0; j <= i; j++) decays.pairs[i * it.ld + j] *= all.among_queries[i * it.ld + j];
    }
};

void forward(const Item& it, const Inputs& in, float* y, float* end) {
    const Sizes& z = it.z;
    const int64_t size = z.k * z.v, heads = it.last - it.first;
    Scratch room(heads * size + Shared::numbers(it) + 3 * z.chunk * it.ldv + Head::numbers(it), 14);
    float *states = room.take(heads * size), *u = room.take(z.chunk * it.ldv), *changed = room.take(z.chunk * it.ldv);
    float* found = room.take(z.chunk * it.ldv);
    Shared all(it, room.take(Shared::numbers(it)));
    Head head(it, in, room);
    const int64_t place = (it.batch * z.heads + it.first) * size;
    std::memcpy(states, in.start + place, sizeof(float) * heads * size);
    for (int64_t chunk = 0; chunk < z.chunks(); chunk++) {
        const int64_t l = it.length(chunk);
        all.read(it, in, chunk);
        for (int64_t h = it.first; h < it.last; h++) {
            float* state = states + (h - it.first) * size;
            head.h = h;
            head.read(all, chunk);
            head.change(all, chunk, state, u, changed);
            product(l, z.v, z.k, {all.q, it.ld, true}, {state, z.v}, found, it.ldv);
            scale_rows(l, z.v, head.decays.from_start, found, found, it.ldv);
            head.advance(all, changed, state);
            head.weigh(all);
            product(l, z.v, l, {head.decays.pairs, it.ld}, {changed, it.ldv}, found, it.ldv, true, LOWER);
            for (int64_t i = 0; i < l; i++)
                std::memcpy(y + ((it.token(chunk) + i) * z.heads + h) * z.v, found + i * it.ldv, sizeof(float) * z.v);
        }
    }
    std::memcpy(end + place, states, sizeof(float) * heads * size);
}

struct Gradients {
    float *q, *k, *v, *log_decay, *beta, *start;
};

// The gradients of a head in one chunk. Those of q, k and of the products are added to `sums`; `state_grad`, of the state
// after the chunk, becomes that of the state before it.
void pull_back(Head& head, const Shared& all, Shared& sums, int64_t chunk, const float* y_grad, const float* state,
               const float* u, const float* changed, float* state_grad, const Gradients& grads, Scratch room) {
    const Item& it = head.it;
    const Sizes& z = it.z;
    const Decays& d = head.decays;
    const int64_t l = it.length(chunk), ld = it.ld, ldv = it.ldv;
    float *gy = room.take(z.chunk * ldv), *arriving = room.take(z.chunk * ldv), *given = room.take(z.chunk * ldv);
    float *pairs = room.take(z.chunk * ld), *weighed = room.take(z.chunk * ld), *turned = room.take(z.k * ld);
    float *start = room.take(z.chunk), *end = room.take(z.chunk), *log_grad = room.take(z.chunk);
    double* among = reinterpret_cast<double*>(room.take(2 * z.chunk));
    for (int64_t i = 0; i < l; i++) {
        const float* from = y_grad + ((it.token(chunk) + i) * z.heads + head.h) * z.v;
        for (int64_t j = 0; j < z.v; j++) {
            gy[i * ldv + j] = from[j];
            arriving[i * ldv + j] = d.from_start[i] * from[j];
        }
    }
    // Of products of the rows of a [k, l] with others b [k, l], added to it.
    const auto meet = [&](const float* with, const float* rows, float* into, float* found) {
        product(z.k, l, z.v, {with, z.v}, {rows, ldv, true}, turned, ld);
        std::fill(found, found + l, 0.0f);
        return [=](const float* other) {
            for (int64_t c = 0; c < z.k; c++)
                for (int64_t i = 0; i < l; i++) {
                    into[c * ld + i] += turned[c * ld + i];
                    found[i] += turned[c * ld + i] * other[c * ld + i];
                }
        };
    };
    // What queries read of the first state, and what keys write to the last one.
    meet(state, arriving, sums.q, start)(all.q);
    scale_rows(l, z.v, d.to_end, changed, head.scaled, ldv);
    meet(state_grad, head.scaled, sums.k, end)(all.k);
    // new: read by the later tokens of the chunk, and written to the last state.
    product(l, z.v, z.k, {all.k, ld, true}, {state_grad, z.v}, given, ldv);
    scale_rows(l, z.v, d.to_end, given, given, ldv);
    product(l, l, z.v, {gy, ldv}, {changed, ldv, true}, pairs, ld, false, BELOW);
    for (int64_t i = 0; i < l; i++)
        for (int64_t j = 0; j < ld; j++) {
            const int64_t at = i * ld + j;
            if (j > i) {
                weighed[at] = 0.0f;
                continue;
            }
            pairs[at] *= d.pairs[at];
            sums.among_queries[at] += pairs[at];
            pairs[at] *= all.among_queries[at];
            weighed[at] = d.pairs[at] * all.among_queries[at];
        }
    product(l, z.v, l, {weighed, ld, true}, {gy, ldv}, given, ldv, true, LOWER_TURNED);
    const float whole = d.whole == 0 ? 0.0f : d.whole * dot(state_grad, state, z.k * z.v);
    for (int64_t i = 0; i < z.k * z.v; i++) state_grad[i] *= d.whole;
    product(z.k, z.v, l, {all.q, ld}, {arriving, ldv}, state_grad, z.v, true);
    // The system: `given` becomes the gradient of beta u.
    solve_turned(l, z.v, head.minus, ld, given, ldv);
    product(l, l, z.v, {given, ldv}, {changed, ldv, true}, weighed, ld, false, BELOW);  // less the gradient of A
    const float* v = head.v(chunk);
    for (int64_t i = 0; i < l; i++) {
        const int64_t token = it.token(chunk) + i;
        float *to = given + i * ldv, *v_grad = grads.v + (token * z.heads + head.h) * z.v;
        float beta_grad = dot(to, u + i * ldv, z.v), read = 0;
        for (int64_t j = 0; j < i; j++) {
            const int64_t at = i * ld + j;
            const float fading = d.pairs[at] * weighed[at];
            beta_grad -= fading * all.among_keys[at];
            sums.among_keys[at] -= fading * head.beta[i];
            pairs[at] += weighed[at] * head.minus[at];
        }
        for (int64_t j = 0; j < z.v; j++) {
            v_grad[j] = head.beta[i] * to[j];
            read -= v_grad[j] * (v[i * z.v_row + j] - u[i * ldv + j]);
            to[j] = -d.from_start[i] * v_grad[j];
        }
        grads.beta[token * z.heads + head.h] = beta_grad;
        start[i] += read;
    }
    // What keys read of the first state.
    product(z.k, l, z.v, {state, z.v}, {given, ldv, true}, sums.k, ld, true);
    product(z.k, z.v, l, {all.k, ld}, {given, ldv}, state_grad, z.v, true);
    sum_among(l, pairs, ld, among);
    grad_log_decays(l, among, start, end, whole, log_grad);
    for (int64_t i = 0; i < l; i++) grads.log_decay[(it.token(chunk) + i) * z.heads + head.h] = log_grad[i];
}

// Forward once more, keeping each chunk's first state, u and new; then back through the chunks, all heads of one together.
void backward(const Item& it, const Inputs& in, const float* y_grad, const float* end_grad, const Gradients& grads) {
    const Sizes& z = it.z;
    const int64_t size = z.k * z.v, heads = it.last - it.first, chunks = z.chunks();
    const int64_t shared = Shared::numbers(it), rows = z.chunk * it.ldv, kept = size + 2 * rows;
    const int64_t one = 3 * rows + (2 * z.chunk + z.k) * it.ld + 5 * z.chunk;
    Scratch room(heads * (chunks * kept + size) + 2 * shared + one + Head::numbers(it), 30);
    float *all = room.take(heads * chunks * kept), *state_grads = room.take(heads * size);
    Shared mine(it, room.take(shared));
    float* memory = room.take(shared);
    Shared found(it, memory);
    Head head(it, in, room);
    const int64_t place = (it.batch * z.heads + it.first) * size;
    const auto of = [&](int64_t chunk, int64_t h) { return all + (chunk * heads + h) * kept; };
    for (int64_t h = 0; h < heads; h++) std::memcpy(of(0, h), in.start + place + h * size, sizeof(float) * size);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        mine.read(it, in, chunk);
        for (int64_t h = 0; h < heads; h++) {
            float *state = of(chunk, h), *u = state + size, *changed = u + rows;
            head.h = it.first + h;
            head.read(mine, chunk);
            head.change(mine, chunk, state, u, changed);
            if (chunk + 1 == chunks) continue;
            std::memcpy(of(chunk + 1, h), state, sizeof(float) * size);
            head.advance(mine, changed, of(chunk + 1, h));
        }
    }
    std::memcpy(state_grads, end_grad + place, sizeof(float) * heads * size);
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        mine.read(it, in, chunk);
        std::fill(memory, memory + shared, 0.0f);
        for (int64_t h = 0; h < heads; h++) {
            const float *state = of(chunk, h), *u = state + size, *changed = u + rows;
            head.h = it.first + h;
            head.read(mine, chunk);
            pull_back(head, mine, found, chunk, y_grad, state, u, changed, state_grads + h * size, grads, room);
        }
        const int64_t l = it.length(chunk), row = z.groups * z.k, token = it.token(chunk) * row + it.group * z.k;
        product(z.k, l, l, {mine.k, it.ld}, {found.among_keys, it.ld}, found.k, it.ld, true);
        product(z.k, l, l, {mine.k, it.ld}, {found.among_keys, it.ld, true}, found.k, it.ld, true);
        product(z.k, l, l, {mine.q, it.ld}, {found.among_queries, it.ld}, found.k, it.ld, true);
        product(z.k, l, l, {mine.k, it.ld}, {found.among_queries, it.ld, true}, found.q, it.ld, true);
        turn(z.k, l, found.q, it.ld, grads.q + token, row);
        turn(z.k, l, found.k, it.ld, grads.k + token, row);
    }
    std::memcpy(grads.start + place, state_grads, sizeof(float) * heads * size);
}

}  // namespace

extern "C" {

void delta_forward(const Sizes* sizes, const float* q, const float* k, const float* v, const float* log_decay,
                   const float* beta, const float* start, const int64_t* documents, float* y, float* end) {
    const Inputs in{q, k, v, log_decay, beta, start, documents};
    share(sizes->items(), sizes->threads, [&](long index) { forward(Item(*sizes, index), in, y, end); });
}

void delta_backward(const Sizes* sizes, const float* q, const float* k, const float* v, const float* log_decay,
                    const float* beta, const float* start, const int64_t* documents, const float* y_grad,
                    const float* end_grad, float* q_grad, float* k_grad, float* v_grad, float* log_decay_grad,
                    float* beta_grad, float* start_grad) {
    const Inputs in{q, k, v, log_decay, beta, start, documents};
    const Gradients grads{q_grad, k_grad, v_grad, log_decay_grad, beta_grad, start_grad};
    share(sizes->items(), sizes->threads,
          [&](long index) { backward(Item(*sizes, index), in, y_grad, end_grad, grads); });
}
}
