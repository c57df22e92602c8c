// One token through a linear that leaves inputs out: y[o] = b[o] + sum over kept i of x[i] w[i][o], w channel-major [I, O].
//
// Rows of w whose input is left out are never touched. Threads share the outputs, each of which adds its rows in one order, so
// that the result does not depend on how many there are. Accumulates in float.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// Vectors of the compiler's own (GCC's and Clang's): AVX, NEON or plain code, as the processor has it.
constexpr int64_t LANES = 8;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));

inline Lanes widen_lanes(const float *from) { return load<Lanes>(from); }

inline Lanes widen_lanes(const bf16 *from) {
#ifdef __AVX2__
    // What GCC 12 makes of the line below takes twice the time.
    return bits_as<Lanes>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
#else
    return bits_as<Lanes>(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}

#if defined(__AVX2__) && defined(__F16C__)
#define HAS_FP16
inline Lanes widen_lanes(const fp16 *from) { return bits_as<Lanes>(_mm256_cvtph_ps(load<__m128i>(from))); }
#endif

// Memory comes in lines of 64 bytes.
constexpr int64_t LINE = 64;
// The processor foresees neither which row comes next nor, soon enough, the rest of several at once: lines to ask for ahead.
constexpr int64_t AHEAD = 4;
// Rows that are added in one pass over the sums.
constexpr int ROWS = 8;
// Outputs whose sums stay in the second-level cache. Less would cut rows into pieces, and memory is fastest in long ones.
constexpr int64_t TILE = 16384;
// A product of fewer bytes is over before other threads have started.
constexpr int64_t WORTH_THREADS = 128 << 10;

// Adds rows k, k + 1, ... of those kept, N at a time, as long as N are left; returns the first that is not added.
template <int N, typename T>
int64_t add_rows(const T *w, const int32_t *kept, const float *x, int64_t k, int64_t count, int64_t outputs, int64_t width, float *sum) {
    constexpr int64_t STEP = LINE / sizeof(T);
    for (; k + N <= count; k += N) {
        const T *row[N], *next[N];
        float value[N];
        for (int r = 0; r < N; r++) {
            row[r] = w + kept[k + r] * outputs;
            next[r] = w + kept[k + r + N < count ? k + r + N : k + r] * outputs;
            value[r] = x[k + r];
        }
        int64_t o = 0;
        for (; o + STEP <= width; o += STEP) {
            const int64_t ahead = o + AHEAD * STEP;
            for (int r = 0; r < N; r++) __builtin_prefetch(ahead < width ? row[r] + ahead : next[r] + (ahead - width));
            for (int64_t p = o; p < o + STEP; p += LANES) {
                Lanes rows = value[0] * widen_lanes(row[0] + p);
                for (int r = 1; r < N; r++) rows += value[r] * widen_lanes(row[r] + p);
                const Lanes added = load<Lanes>(sum + p) + rows;
                std::memcpy(sum + p, &added, sizeof added);
            }
        }
        for (; o < width; o++) {
            float rows = value[0] * widen(row[0][o]);
            for (int r = 1; r < N; r++) rows += value[r] * widen(row[r][o]);
            sum[o] += rows;
        }
    }
    return k;
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
    if (count * outputs * int64_t(sizeof(T)) < WORTH_THREADS) threads = 1;
    // Whole lines, so that the same outputs are computed by the same instructions however many threads there are.
    constexpr int64_t WHOLE = LINE / 2;
    const int64_t share = ((outputs + threads - 1) / threads + WHOLE - 1) / WHOLE * WHOLE;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        const int64_t end = (part + 1) * share < outputs ? (part + 1) * share : outputs;
        alignas(64) float sum[TILE];
        for (int64_t from = part * share; from < end; from += TILE) {
            const int64_t width = end - from < TILE ? end - from : TILE;
            for (int64_t o = 0; o < width; o++) sum[o] = bias == nullptr ? 0.0f : widen(bias[from + o]);
            const int64_t rest = add_rows<ROWS>(w + from, kept, values, 0, count, outputs, width, sum);
            add_rows<1>(w + from, kept, values, rest, count, outputs, width, sum);
            for (int64_t o = 0; o < width; o++) narrow(sum[o], y + from + o);
        }
    }
}

}  // namespace

extern "C" {

// tau may be null: then every row is read, which is a dense product of the same making.
#define GEMV(NAME, TYPE) \
    void NAME(const void *x, const void *w, const void *tau, const void *bias, void *y, int64_t inputs, int64_t outputs, int threads) { \
        gemv((const TYPE *)x, (const TYPE *)w, (const float *)tau, (const TYPE *)bias, (TYPE *)y, inputs, outputs, threads); \
    }

GEMV(gemv_float32, float)
GEMV(gemv_bfloat16, bf16)
#ifdef HAS_FP16
GEMV(gemv_float16, fp16)
#endif

}
