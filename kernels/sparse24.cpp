// Products with a packed 2:4 weight: y[n][o] = b[o] + sum over i of x[n][i] w[o][i], w in the vector layout of sparse24.py.
//
// A register holds the kept pair of one group of four inputs of four rows, beside the same of another group. A permute with the
// nibbles' bits as its selector fetches the inputs that belong to them: it looks at the low two bits of each lane only, so that
// one shift makes all eight selectors. Two products serve 16 dense weights. Accumulates in float, in an order that does not
// depend on the number of threads.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "floats.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace {

// A step: 32 inputs of four rows, or 8 groups; a register is of group p and group p + PAIRS.
constexpr int ROWS = 4, STEP = 32, LANES = 8, PAIRS = STEP / LANES;
// The processor does not ask memory for the next lines soon enough: bytes to ask for ahead.
constexpr int64_t AHEAD = 2048;
// Tokens that one pass over a row's words serves.
constexpr int64_t TOKENS_AT_ONCE = 4;
// Inputs in float, all tokens', that stay in the second-level cache while all rows go by.
constexpr int64_t CACHED = 256 << 10;
// A product of fewer bytes is over before other threads have started.
constexpr int64_t WORTH_THREADS = 128 << 10;

template <typename T>
constexpr int64_t STEP_BYTES = ROWS * STEP / 2 * sizeof(T);

struct Kept {
    __m256 first, second;
};

// The two kept weights of pair p of groups.
inline Kept widen_kept(const bf16 *words, int p) {
    const __m256i both = load<__m256i>(words + 16 * p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))))};
}

inline Kept widen_kept(const float *words, int p) { return {_mm256_loadu_ps(words + 16 * p), _mm256_loadu_ps(words + 16 * p + 8)}; }

#ifdef __F16C__
inline Kept widen_kept(const fp16 *words, int p) {
    const __m128i low_then_high = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256i halves = _mm256_shuffle_epi8(load<__m256i>(words + 16 * p), _mm256_broadcastsi128_si256(low_then_high));
    const __m256i sorted = _mm256_permute4x64_epi64(halves, 0b11011000);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(sorted)), _mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1))};
}
#endif

// y of TOKENS tokens for four rows.
template <typename T, int TOKENS>
void four_rows(const T *words, const int32_t *meta, const float *x, int64_t width, float (*y)[ROWS]) {
    // Enough sums that no product waits for the one before.
    constexpr int CHAINS = TOKENS == 1 ? 4 : 2;
    __m256 sums[TOKENS][CHAINS];
    for (int t = 0; t < TOKENS; t++)
        for (int c = 0; c < CHAINS; c++) sums[t][c] = _mm256_setzero_ps();
    const __m256i behind = _mm256_setr_epi32(0, 0, 0, 0, 4 * PAIRS, 4 * PAIRS, 4 * PAIRS, 4 * PAIRS);
    for (int64_t i = 0; i < width; i += STEP, words += ROWS * STEP / 2, meta += ROWS) {
        for (int64_t line = 0; line < STEP_BYTES<T>; line += 64) __builtin_prefetch((const char *)words + AHEAD + line);
        __builtin_prefetch((const char *)meta + AHEAD);
        const __m256i nibbles = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(load<__m128i>(meta)), behind);
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++) {
            const Kept kept = widen_kept(words, p);
            const __m256i first = _mm256_srli_epi32(nibbles, 4 * p), second = _mm256_srli_epi32(nibbles, 4 * p + 2);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) {
                const __m256 inputs = _mm256_loadu_ps(x + t * width + i + p * LANES);
                __m256 *sum = sums[t] + 2 * p % CHAINS;
                sum[0] = _mm256_fmadd_ps(kept.first, _mm256_permutevar_ps(inputs, first), sum[0]);
                sum[1] = _mm256_fmadd_ps(kept.second, _mm256_permutevar_ps(inputs, second), sum[1]);
            }
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        __m256 sum = sums[t][0];
        for (int c = 1; c < CHAINS; c++) sum = _mm256_add_ps(sum, sums[t][c]);
        _mm_storeu_ps(y[t], _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
    }
}

// The inputs of each token in float, in the order in which registers want them, and zeros up to `width`.
template <typename T>
const float *in_order(const T *x, int64_t tokens, int64_t inputs, int64_t width) {
    static thread_local std::vector<float> ordered;
    ordered.assign(tokens * width, 0.0f);
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t group = 0; group < inputs / 4; group++) {
            const int64_t in_step = group % (2 * PAIRS);
            const int64_t place = group - in_step + in_step % PAIRS * 2 + in_step / PAIRS;
            for (int64_t i = 0; i < 4; i++) ordered[n * width + 4 * place + i] = widen(x[n * inputs + 4 * group + i]);
        }
    return ordered.data();
}

template <typename T>
void matmul(const T *x, const T *words, const int32_t *meta, const T *bias, T *y, int64_t tokens, int64_t outputs, int64_t inputs, int threads) {
    const int64_t width = (inputs + STEP - 1) / STEP * STEP;
    const float *ordered = in_order(x, tokens, inputs, width);
    if (outputs * width * int64_t(sizeof(T)) / 2 < WORTH_THREADS) threads = 1;
    int64_t block = CACHED / int64_t(sizeof(float)) / width / TOKENS_AT_ONCE * TOKENS_AT_ONCE;
    if (block < TOKENS_AT_ONCE) block = TOKENS_AT_ONCE;
    for (int64_t from = 0; from < tokens; from += block) {
        const int64_t to = from + block < tokens ? from + block : tokens;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t o = 0; o < outputs; o += ROWS)
            for (int64_t n = from; n < to;) {
                const int64_t count = to - n < TOKENS_AT_ONCE ? to - n : TOKENS_AT_ONCE;
                const auto run = count == 1 ? four_rows<T, 1> : count == 2 ? four_rows<T, 2> : count == 3 ? four_rows<T, 3> : four_rows<T, 4>;
                float sums[TOKENS_AT_ONCE][ROWS];
                run(words + o * width / 2, meta + o * width / STEP, ordered + n * width, width, sums);
                for (int64_t t = 0; t < count; t++, n++)
                    for (int64_t r = 0; r < ROWS && o + r < outputs; r++)
                        narrow(sums[t][r] + (bias == nullptr ? 0.0f : widen(bias[o + r])), y + n * outputs + o + r);
            }
    }
}

// The same for a dense weight [O, I], to compare with: one token, four rows at a time. Outputs are a multiple of 4, inputs of 32.

inline void widen_16(const bf16 *from, __m256 *to) {
    const __m256i values = load<__m256i>(from);
    to[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), values));
    to[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), values));
}

inline void widen_16(const float *from, __m256 *to) {
    to[0] = _mm256_loadu_ps(from);
    to[1] = _mm256_loadu_ps(from + LANES);
}

#ifdef __F16C__
inline void widen_16(const fp16 *from, __m256 *to) {
    to[0] = _mm256_cvtph_ps(load<__m128i>(from));
    to[1] = _mm256_cvtph_ps(load<__m128i>(from + LANES));
}
#endif

inline float total(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <typename T>
void dense_rows(const T *w, const float *x, int64_t inputs, float *y) {
    constexpr int64_t LINE = 64 / sizeof(T);
    const int64_t row_bytes = inputs * sizeof(T);
    __m256 sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (int64_t i = 0; i < inputs; i += LINE) {
        // Beyond the end of these rows lie the next four.
        const int64_t place = i * int64_t(sizeof(T)) + AHEAD;
        const char *ahead = (const char *)w + place + (place < row_bytes ? 0 : (ROWS - 1) * row_bytes);
        for (int r = 0; r < ROWS; r++) __builtin_prefetch(ahead + r * row_bytes);
        for (int64_t j = i; j < i + LINE; j += 16)
            for (int r = 0; r < ROWS; r++) {
                __m256 weights[2];
                widen_16(w + r * inputs + j, weights);
                sums[r][0] = _mm256_fmadd_ps(weights[0], _mm256_loadu_ps(x + j), sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(weights[1], _mm256_loadu_ps(x + j + LANES), sums[r][1]);
            }
    }
    for (int r = 0; r < ROWS; r++) y[r] = total(_mm256_add_ps(sums[r][0], sums[r][1]));
}

template <typename T>
void dense(const T *x, const T *w, const T *bias, T *y, int64_t outputs, int64_t inputs, int threads) {
    static thread_local std::vector<float> ordered;
    ordered.resize(inputs);
    for (int64_t i = 0; i < inputs; i++) {
        // As unpacking a register of bf16 puts them: groups 0, 2, 1, 3.
        const int64_t group = i / 4 % 4, place = std::is_same<T, bf16>::value ? group % 2 * 2 + group / 2 : group;
        ordered[i / 16 * 16 + 4 * place + i % 4] = widen(x[i]);
    }
    const float *from = ordered.data();
    if (outputs * inputs * int64_t(sizeof(T)) < WORTH_THREADS) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < outputs; o += ROWS) {
        float sums[ROWS];
        dense_rows(w + o * inputs, from, inputs, sums);
        for (int r = 0; r < ROWS; r++) narrow(sums[r] + (bias == nullptr ? 0.0f : widen(bias[o + r])), y + o + r);
    }
}

}  // namespace

extern "C" {

#define PRODUCTS(NAME, TYPE) \
    void matmul24_##NAME(const void *x, const void *words, const void *meta, const void *bias, void *y, int64_t tokens, int64_t outputs, int64_t inputs, int threads) { \
        matmul((const TYPE *)x, (const TYPE *)words, (const int32_t *)meta, (const TYPE *)bias, (TYPE *)y, tokens, outputs, inputs, threads); \
    } \
    void dense_##NAME(const void *x, const void *w, const void *bias, void *y, int64_t outputs, int64_t inputs, int threads) { \
        dense((const TYPE *)x, (const TYPE *)w, (const TYPE *)bias, (TYPE *)y, outputs, inputs, threads); \
    }

PRODUCTS(float32, float)
PRODUCTS(bfloat16, bf16)
#ifdef __F16C__
PRODUCTS(float16, fp16)
#endif

}

#endif
