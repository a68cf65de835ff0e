// Products of small matrices that lie in the cache, and what mixers need beside them. Letters: l (i, j) tokens of a
// chunk; a matrix [m, n] has rows that are `ld` numbers apart.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace tiles {

#if defined(__AVX512F__)
constexpr long LANES = 16, TILE_ROWS = 12;
#else
constexpr long LANES = 8, TILE_ROWS = 6;
#endif
constexpr long TILE_COLS = 2 * LANES;
constexpr long SPARE = 16;  // numbers between rows of a power of two, which would share few places of the cache

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4)));
typedef float four __attribute__((vector_size(16)));
typedef float loose_four __attribute__((vector_size(16), aligned(4)));
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define ZOO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
typedef int32_t order_of_four __attribute__((vector_size(16)));
#define ZOO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, order_of_four{__VA_ARGS__})
#endif

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }

inline float exponential(float x) {  // relative error about 1e-7; a loop of it becomes vector instructions
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::floor(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}
inline float decayed(double log) { return log < -87.0 ? 0.0f : exponential(static_cast<float>(log)); }
inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Which parts of a product are needed, and which of a factor are not zero.
enum Shape {
    FULL,
    LOWER,         // a is zero above its diagonal
    LOWER_TURNED,  // a is turned, and before that zero above its diagonal
    BELOW          // of the result, what is on the diagonal and below it
};
struct Left {  // element (i, k) is p[i * ld + k]; turned: p[k * ld + i]
    const float* p;
    long ld;
    bool turned = false;
};
struct Right {  // element (k, j) is p[k * ld + j]; turned: p[j * ld + k]
    const float* p;
    long ld;
    bool turned = false;
};

// out [n, ld_out] = in [m, ld] turned.
inline void turn(long m, long n, const float* in, long ld, float* out, long ld_out) {
    const long whole_m = m / 4 * 4, whole_n = n / 4 * 4;
    for (long i = 0; i < whole_m; i += 4)
        for (long j = 0; j < whole_n; j += 4) {
            four r[4];
            for (long k = 0; k < 4; k++) r[k] = *reinterpret_cast<const loose_four*>(in + (i + k) * ld + j);
            const four a = ZOO_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = ZOO_SHUFFLE(r[2], r[3], 0, 4, 1, 5);
            const four c = ZOO_SHUFFLE(r[0], r[1], 2, 6, 3, 7), d = ZOO_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
            const four found[4] = {ZOO_SHUFFLE(a, b, 0, 1, 4, 5), ZOO_SHUFFLE(a, b, 2, 3, 6, 7),
                                   ZOO_SHUFFLE(c, d, 0, 1, 4, 5), ZOO_SHUFFLE(c, d, 2, 3, 6, 7)};
            for (long k = 0; k < 4; k++) *reinterpret_cast<loose_four*>(out + (j + k) * ld_out + i) = found[k];
        }
    for (long i = 0; i < m; i++)
        for (long j = i < whole_m ? whole_n : 0; j < n; j++) out[j * ld_out + i] = in[i * ld + j];
}

template <bool TURNED>
inline void tile(long depth, const float* a, long lda, const float* b, float* c, long ldc, long rows, long cols,
                 bool add) {
    const float* row[TILE_ROWS];
    for (long i = 0; i < TILE_ROWS; i++) row[i] = TURNED ? a + std::min(i, rows - 1) : a + std::min(i, rows - 1) * lda;
    vec sum[TILE_ROWS][2] = {};
    for (long k = 0; k < depth; k++, b += TILE_COLS) {
        const vec b0 = load(b), b1 = load(b + LANES);
        const long place = TURNED ? k * lda : k;
#pragma GCC unroll 12
        for (long i = 0; i < TILE_ROWS; i++) {
            sum[i][0] += row[i][place] * b0;
            sum[i][1] += row[i][place] * b1;
        }
    }
    if (rows == TILE_ROWS && cols == TILE_COLS) {
#pragma GCC unroll 12
        for (long i = 0; i < TILE_ROWS; i++)
            for (long j = 0; j < 2; j++) {
                float* to = c + i * ldc + j * LANES;
                store(to, add ? load(to) + sum[i][j] : sum[i][j]);
            }
        return;
    }
    float edge[TILE_ROWS][TILE_COLS];
    std::memcpy(edge, sum, sizeof edge);
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < cols; j++) c[i * ldc + j] = edge[i][j] + (add ? c[i * ldc + j] : 0.0f);
}

// Columns j .. j + cols of b as [k, TILE_COLS], zeros beyond `cols`.
inline void pack(const Right& b, long k, long j, long cols, float* panel) {
    if (b.turned) {
        if (cols < TILE_COLS) std::memset(panel, 0, sizeof(float) * k * TILE_COLS);
        turn(cols, k, b.p + j * b.ld, b.ld, panel, TILE_COLS);
        return;
    }
    for (long i = 0; i < k; i++) {
        const float* from = b.p + i * b.ld + j;
        float* to = panel + i * TILE_COLS;
        if (cols == TILE_COLS)
            std::memcpy(to, from, sizeof(float) * TILE_COLS);
        else
            for (long q = 0; q < TILE_COLS; q++) to[q] = q < cols ? from[q] : 0.0f;
    }
}

// c [m, n] = a [m, k] b [k, n], or added to it.
inline void product(long m, long n, long k, const Left& a, const Right& b, float* c, long ldc, bool add = false,
                    Shape shape = FULL) {
    static thread_local std::vector<float> panel;
    if (static_cast<long>(panel.size()) < k * TILE_COLS) panel.resize(k * TILE_COLS);
    for (long j = 0; j < n; j += TILE_COLS) {
        const long cols = std::min(TILE_COLS, n - j);
        pack(b, k, j, cols, panel.data());
        for (long i = 0; i < m; i += TILE_ROWS) {
            const long rows = std::min(TILE_ROWS, m - i);
            if (shape == BELOW && j > i + rows - 1) continue;
            const long first = shape == LOWER_TURNED ? std::min(i, k) : 0;
            const long last = shape == LOWER ? std::min(k, i + rows) : k;
            const float* right = panel.data() + first * TILE_COLS;
            float* to = c + i * ldc + j;
            if (a.turned)
                tile<true>(last - first, a.p + first * a.ld + i, a.ld, right, to, ldc, rows, cols, add);
            else
                tile<false>(last - first, a.p + i * a.ld + first, a.ld, right, to, ldc, rows, cols, add);
        }
    }
}

// Memory of a thread that is handed out piece by piece, aligned as vectors are.
class Scratch {
  public:
    // Room for `numbers` in all, in at most `pieces` pieces.
    Scratch(long numbers, long pieces) {
        static thread_local std::vector<float> memory;
        const size_t needed = numbers + (pieces + 1) * LANES;
        if (memory.size() < needed) memory.resize(needed);
        next_ = memory.data();
    }
    float* take(long numbers) {
        const uintptr_t bytes = LANES * sizeof(float), place = reinterpret_cast<uintptr_t>(next_);
        float* found = reinterpret_cast<float*>((place + bytes - 1) / bytes * bytes);
        next_ = found + numbers;
        return found;
    }

  private:
    float* next_;
};

inline float dot(const float* a, const float* b, long n) {
    vec sum = {};
    long i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float found = 0;
    for (long j = 0; j < LANES; j++) found += sum[j];
    for (; i < n; i++) found += a[i] * b[i];
    return found;
}

// How a chunk's tokens fade, from the log decays of its tokens and the documents they are of.
struct Decays {
    long l, ld;
    float *pairs;  // [l, ld]: what is left at token i of what token j wrote; zero above the diagonal
    float *from_start, *to_end;  // [l]: of the chunk's first state at a token, of what a token wrote at the end
    float whole;                 // of the first state at the end
    double* sums;                // [l]

    // documents: of the tokens, or null; documents[-1] is that of the token before, unless these are the `first`.
    void fill(const int64_t* documents, bool first) {
        const double total = sums[l - 1];
        for (long i = 0; i < l; i++) {
            float* row = pairs + i * ld;
            const double mine = sums[i];
            for (long j = 0; j <= i; j++) row[j] = static_cast<float>(mine - sums[j]);
            for (long j = 0; j <= i; j++) row[j] = row[j] < -87.0f ? 0.0f : exponential(row[j]);
            for (long j = i + 1; j < ld; j++) row[j] = 0.0f;
            from_start[i] = decayed(mine), to_end[i] = decayed(total - mine);
        }
        whole = decayed(total);
        if (!documents) return;
        const int64_t before = documents[first ? 0 : -1], last = documents[l - 1];
        for (long i = 0; i < l; i++) {
            for (long j = 0; j <= i; j++)
                if (documents[i] != documents[j]) pairs[i * ld + j] = 0.0f;
            if (documents[i] != before) from_start[i] = 0.0f;
            if (documents[i] != last) to_end[i] = 0.0f;
        }
        if (last != before) whole = 0.0f;
    }
};

// The gradients of the log decays of tokens, from those of `Decays` times what they are of: `among` [l] sums of rows
// less sums of columns of the pairs, `start` and `end` [l], `whole`. Sums of many terms whose own are to cancel: fp64.
inline void grad_log_decays(long l, const double* among, const float* start, const float* end, float whole,
                            float* grad) {
    double later = whole;
    for (long i = l - 1; i >= 0; i--) grad[i] = static_cast<float>(later += among[i] + start[i]);
    double earlier = 0;
    for (long i = 0; i < l; i++) {
        grad[i] += static_cast<float>(earlier);
        earlier += end[i];
    }
}

// among [l]: sums of rows less sums of columns of pairs [l, ld], which is zero above the diagonal.
inline void sum_among(long l, const float* pairs, long ld, double* among) {
    std::fill(among, among + l, 0.0);
    for (long i = 0; i < l; i++) {
        double row = 0;
        for (long j = 0; j < i; j++) {  // the diagonal is in both sums
            row += pairs[i * ld + j];
            among[j] -= pairs[i * ld + j];
        }
        among[i] += row;
    }
}

// Call work(item) for all items, each by one thread.
template <class Work>
void share(long items, long threads, const Work& work) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
#endif
    for (long item = 0; item < items; item++) work(item);
}

}  // namespace tiles
