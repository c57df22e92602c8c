// One token through a linear that leaves inputs out: y[o] = b[o] + sum over kept i of x[i] w[i][o], w channel-major [I, O].
//
// Rows of w whose input is left out are never touched. Threads share the outputs, and every output adds its rows in order, so
// that the result does not depend on how many there are. Accumulates in float.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float value, float *out) { *out = value; }

inline void narrow(float value, bf16 *out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // To the nearest, ties to even; a NaN stays one.
    out->bits = std::isnan(value) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Outputs that a pass over the rows works on: they stay in the first-level cache.
constexpr int64_t TILE = 2048;

// Memory comes in lines of 64 bytes.
constexpr int64_t LINE = 64;
constexpr int ROWS = 4;

template <typename T>
void tile(const T *w, const int32_t *kept, const float *x, int64_t count, int64_t outputs, int64_t from, int64_t width, float *sum) {
    constexpr int64_t STEP = LINE / sizeof(T);
    int64_t k = 0;
    for (; k + ROWS <= count; k += ROWS) {
        const T *row[ROWS], *next[ROWS];
        for (int r = 0; r < ROWS; r++) {
            row[r] = w + kept[k + r] * outputs + from;
            // The processor foresees the rest of a row, not which row comes next.
            next[r] = w + kept[k + r + ROWS < count ? k + r + ROWS : k + r] * outputs + from;
        }
        const float x0 = x[k], x1 = x[k + 1], x2 = x[k + 2], x3 = x[k + 3];
        const T *w0 = row[0], *w1 = row[1], *w2 = row[2], *w3 = row[3];
        int64_t o = 0;
        for (; o + STEP <= width; o += STEP) {
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(next[r] + o);
#pragma GCC ivdep
            for (int64_t p = o; p < o + STEP; p++) {
                sum[p] += x0 * widen(w0[p]) + x1 * widen(w1[p]) + x2 * widen(w2[p]) + x3 * widen(w3[p]);
            }
        }
        for (; o < width; o++) {
            sum[o] += x0 * widen(w0[o]) + x1 * widen(w1[o]) + x2 * widen(w2[o]) + x3 * widen(w3[o]);
        }
    }
    for (; k < count; k++) {
        const T *row = w + kept[k] * outputs + from;
        const float each = x[k];
#pragma GCC ivdep
        for (int64_t o = 0; o < width; o++) sum[o] += each * widen(row[o]);
    }
}

template <typename T>
void gemv(const T *x, const T *w, const float *tau, const T *bias, T *y, int64_t inputs, int64_t outputs, int threads) {
    static thread_local std::vector<int32_t> kept_rows;
    static thread_local std::vector<float> kept_values;
    kept_rows.resize(inputs);
    kept_values.resize(inputs);
    int64_t count = 0;
    for (int64_t i = 0; i < inputs; i++) {
        const float value = widen(x[i]);
        kept_rows[count] = int32_t(i);
        kept_values[count] = value;
        // Not the comparison turned around: NaN is kept.
        count += tau == nullptr || !(std::fabs(value) <= tau[i]);
    }
    // The threads' own copies of a thread_local are empty.
    const int32_t *kept = kept_rows.data();
    const float *values = kept_values.data();
    // Whole lines, so that the same outputs are computed by the same instructions however many threads there are.
    const int64_t share = ((outputs + threads - 1) / threads + LINE / 2 - 1) / (LINE / 2) * (LINE / 2);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        const int64_t end = (part + 1) * share < outputs ? (part + 1) * share : outputs;
        alignas(64) float sum[TILE];
        for (int64_t from = part * share; from < end; from += TILE) {
            const int64_t width = end - from < TILE ? end - from : TILE;
            for (int64_t o = 0; o < width; o++) sum[o] = bias == nullptr ? 0.0f : widen(bias[from + o]);
            tile(w, kept, values, count, outputs, from, width, sum);
            for (int64_t o = 0; o < width; o++) narrow(sum[o], y + from + o);
        }
    }
}

}  // namespace

extern "C" {

// tau may be null: then every row is read, which is a dense product of the same making.
void gemv_float32(const void *x, const void *w, const void *tau, const void *bias, void *y, int64_t inputs, int64_t outputs, int threads) {
    gemv((const float *)x, (const float *)w, (const float *)tau, (const float *)bias, (float *)y, inputs, outputs, threads);
}

void gemv_bfloat16(const void *x, const void *w, const void *tau, const void *bias, void *y, int64_t inputs, int64_t outputs, int threads) {
    gemv((const bf16 *)x, (const bf16 *)w, (const float *)tau, (const bf16 *)bias, (bf16 *)y, inputs, outputs, threads);
}

}
