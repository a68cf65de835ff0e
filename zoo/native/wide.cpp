// Products with weights in bf16, taken in fp32 on a processor without units for bf16: weights are widened as they are
// packed, so that they come from memory once and at half the bytes.
//
// Called by zoo/decoding/wide.py.

#include "tiles.h"

using namespace tiles;

namespace {

constexpr int64_t DEPTH = 512;        // of a packed panel
constexpr int64_t FEW = 6;            // rows up to which packing a weight costs more than it saves
constexpr int64_t SPAN = 8 * TILE_COLS;  // outputs that a thread takes at a time

inline float number(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// Rows j .. j + TILE_COLS of weight [n, k], their columns k0 .. k0 + depth, as [depth, TILE_COLS] in fp32.
void widen(const uint16_t* weight, int64_t k, int64_t rows, int64_t depth, float* wide, float* panel) {
    for (int64_t i = 0; i < TILE_COLS; i++) {
        const uint16_t* from = weight + std::min(i, rows - 1) * k;
        for (int64_t d = 0; d < depth; d++) wide[i * DEPTH + d] = number(from[d]);
    }
    turn(TILE_COLS, depth, wide, DEPTH, panel, TILE_COLS);
}

typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));

inline vec widened(const uint16_t* place) {
    return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(place), bits) << 16);
}

// The scalar products y of ROWS rows x [k] with a row of the weight, which comes from memory meanwhile.
template <int ROWS>
void dots(int64_t k, const float* x, const uint16_t* w, float* y, int64_t n) {
    vec sums[ROWS][2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) {
        __builtin_prefetch(w + i + 512);
        const vec w0 = widened(w + i), w1 = widened(w + i + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            sums[r][0] += load(x + r * k + i) * w0;
            sums[r][1] += load(x + r * k + i + LANES) * w1;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        const vec both = sums[r][0] + sums[r][1];
        float sum = 0;
        for (int64_t j = 0; j < LANES; j++) sum += both[j];
        for (int64_t j = i; j < k; j++) sum += x[r * k + j] * number(w[j]);
        y[r * n] = sum;
    }
}

void few(int64_t m, int64_t k, const float* x, const uint16_t* w, float* y, int64_t n) {
    switch (m) {
        case 1: return dots<1>(k, x, w, y, n);
        case 2: return dots<2>(k, x, w, y, n);
        case 3: return dots<3>(k, x, w, y, n);
        case 4: return dots<4>(k, x, w, y, n);
        case 5: return dots<5>(k, x, w, y, n);
        default: dots<6>(k, x, w, y, n);
    }
}

}  // namespace

// y [m, n] = x [m, k] weight^T, weight [n, k] in bf16.
extern "C" void wide_product(int64_t m, int64_t n, int64_t k, const float* x, const uint16_t* weight, float* y,
                             int64_t threads) {
    if (m == 0) return;
    share((n + SPAN - 1) / SPAN, threads, [&](long item) {
        Scratch room(2 * DEPTH * TILE_COLS, 2);
        float *wide = room.take(DEPTH * TILE_COLS), *panel = room.take(DEPTH * TILE_COLS);
        const int64_t first = item * SPAN, last = std::min(n, first + SPAN);
        if (m <= FEW) {
            for (int64_t j = first; j < last; j++) few(m, k, x, weight + j * k, y + j, n);
            return;
        }
        for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
            const int64_t depth = std::min(DEPTH, k - k0);
            for (int64_t j = first; j < last; j += TILE_COLS) {
                const int64_t cols = std::min<int64_t>(TILE_COLS, last - j);
                widen(weight + j * k + k0, k, cols, depth, wide, panel);
                for (int64_t i = 0; i < m; i += TILE_ROWS)
                    tile<false>(depth, x + i * k + k0, k, panel, y + i * n + j, n, std::min<int64_t>(TILE_ROWS, m - i),
                                cols, k0 > 0);
            }
        }
    });
}
