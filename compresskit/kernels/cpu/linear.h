/* The entry points of a layout whose words say which of 64 inputs are kept, and whose values follow row by
 * row.
 *
 * Of whoever compiles it: VALUE_TYPE. Of whoever includes it: MASK(word), the mask bits of a word, and
 * first_value(job, row), where the values of a row begin.
 */
#include <stdlib.h>

#include "job.h"
#include "vectors.h"

#define ROWS 16
#define CACHE_BYTES (32 << 10)
/* How long before it is needed a value is asked for: where rows are read to their ends, and where in parts. */
#define FAR_BYTES 4096
#define NEAR_BYTES 1024
#define UNROLL _Pragma("GCC unroll 16")
#if LANES == 16
#define MOST_TOKENS 16
#elif defined(__AVX2__)
#define MOST_TOKENS 8
#else
#define MOST_TOKENS 4
#endif

/* A block is of a size that there is code for; what it has too many are zeros. */
static int block_size(int64_t tokens) {
    int size = 1;
    while (size < tokens && size < MOST_TOKENS) size *= 2;
    return size;
}

/* Asks for the next bytes of what is read in order while rows are read in parts, which no processor foresees. */
INLINE const char *prefetch(const char *from, int64_t bytes) {
    for (const char *at = from; at < from + bytes + 63; at += 64) __builtin_prefetch(at, 0, 2);
    return from + bytes;
}

/* The scale of each of the inputs from ``first`` on, for groups of a width that cuts words. */
static void spread_scales(const Job *job, int64_t row, float *to, int64_t first, int64_t last) {
    int64_t group = job->ins / job->groups;
    for (int64_t i = first; i < last; i++) to[i] = i < job->ins ? job->scales[row * job->groups + i / group] : 0;
}

static void arrange_plain(const Job *job, int64_t first, int64_t count, float *to) {
    const uint16_t *from = (const uint16_t *)job->inputs + first;
    if (job->input_type == FP32)
        memcpy(to, (const float *)job->inputs + first, sizeof(float) * (size_t)count);
    else if (job->input_type == BF16)
        for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(from[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i] = fp16_to_float(from[i]);
}

#if VALUE_TYPE == FP32
#define NAME f32
#define VALUE float
#define STEP STEP_f32
#define VECTORS VECTORS_f32
#define DECODE decode_f32
#define WEIGHT vec
#define NUMBER float
#define WIDTH LANES
#define ADD(sum, weights, inputs) add_product(sum, weights, load(inputs))
#define HAS_SCALES 0
#define ARRANGE arrange_plain
#include "rows.h"
#endif

#if VALUE_TYPE == BF16
#if SPLIT
/* Of every 32 inputs the even ones first. */
static void arrange_split(const Job *job, int64_t first, int64_t count, float *to) {
    float plain[64] = {0};
    arrange_plain(job, first, count, plain);
    for (int half = 0; half < 64; half += 32)
        for (int i = 0; i < 16; i++) {
            to[half + i] = plain[half + 2 * i];
            to[half + 16 + i] = plain[half + 2 * i + 1];
        }
}
#endif
#define NAME bf16
#define VALUE uint16_t
#define STEP STEP_bf16
#define VECTORS VECTORS_bf16
#define DECODE decode_bf16
#define WEIGHT vec
#define NUMBER float
#define WIDTH LANES
#define ADD(sum, weights, inputs) add_product(sum, weights, load(inputs))
#define HAS_SCALES 0
#if SPLIT
#define ARRANGE arrange_split
#else
#define ARRANGE arrange_plain
#endif
#include "rows.h"
#endif

#if VALUE_TYPE == FP16
#define NAME f16
#define VALUE uint16_t
#define STEP STEP_f16
#define VECTORS VECTORS_f16
#define DECODE decode_f16
#define WEIGHT vec
#define NUMBER float
#define WIDTH LANES
#define ADD(sum, weights, inputs) add_product(sum, weights, load(inputs))
#define HAS_SCALES 0
#define ARRANGE arrange_plain
#include "rows.h"
#endif

#if VALUE_TYPE == INT8
#define NAME i8
#define VALUE int8_t
#define STEP STEP_i8
#define VECTORS VECTORS_i8
#define DECODE decode_i8
#define WEIGHT vec
#define NUMBER float
#define WIDTH LANES
#define ADD(sum, weights, inputs) add_product(sum, weights, load(inputs))
#define HAS_SCALES 1
#define ARRANGE arrange_plain
#include "rows.h"
#endif

#if HAS_DOT && VALUE_TYPE == BF16
static void arrange_words(const Job *job, int64_t first, int64_t count, uint16_t *to) {
    memcpy(to, (const uint16_t *)job->inputs + first, sizeof(uint16_t) * (size_t)count);
}
INLINE void decode_words(words_t *out, uint64_t mask, const uint16_t *values) {
    out[0] = expand_words(mask, values);
}
#define NAME dot
#define VALUE uint16_t
#define STEP 32
#define VECTORS 1
#define DECODE decode_words
#define WEIGHT words_t
#define NUMBER uint16_t
#define WIDTH 32
#define ADD add_dot
#define HAS_SCALES 0
#define ARRANGE arrange_words
#include "rows.h"
#endif

/* outputs = inputs @ weight.T + bias. */
void linear(const Job *job, Parallel parallel) {
    if (!job->tokens || !job->outs) return;
#if VALUE_TYPE == FP32
    linear_f32(job, parallel);
#elif VALUE_TYPE == FP16
    linear_f16(job, parallel);
#elif VALUE_TYPE == INT8
    linear_i8(job, parallel);
#elif HAS_DOT
    if (job->input_type == BF16)
        linear_dot(job, parallel);
    else
        linear_bf16(job, parallel);
#else
    linear_bf16(job, parallel);
#endif
}

/* 64 weights as fp32, in order; returns where the next values are. */
static const char *natural(uint64_t mask, const char *values, float *lanes) {
#define NATURAL(name, type)                                                          \
    for (int i = 0; i < 64; i += STEP_##name) {                                      \
        vec out[VECTORS_##name];                                                     \
        uint64_t part = mask >> i & ~(uint64_t)0 >> (64 - STEP_##name);              \
        decode_##name(out, part, (const type *)values);                              \
        for (int v = 0; v < VECTORS_##name; v++) store(lanes + i + v * LANES, out[v]); \
        values += sizeof(type) * (size_t)__builtin_popcountll(part);                 \
    }
#if VALUE_TYPE == FP32
    NATURAL(f32, float)
#elif VALUE_TYPE == FP16
    NATURAL(f16, uint16_t)
#elif VALUE_TYPE == INT8
    NATURAL(i8, int8_t)
#elif SPLIT
    for (int i = 0; i < 64; i += 32) {
        uint16_t words[32];
        _mm512_storeu_si512(words, expand_words(mask >> i & 0xffffffff, (const uint16_t *)values));
        for (int j = 0; j < 32; j++) lanes[i + j] = bf16_to_float(words[j]);
        values += 2 * __builtin_popcountll(mask >> i & 0xffffffff);
    }
#else
    NATURAL(bf16, uint16_t)
#endif
#undef NATURAL
    return values;
}

static void expand_rows(const Job *job, int64_t first, int64_t last) {
    const int size = VALUE_BYTES;
    const int out_size = job->input_type == FP32 ? 4 : 2;
    float lanes[64], *spread = job->groups ? malloc(sizeof(float) * 64 * (size_t)job->words_per_row) : NULL;
    for (int64_t row = first; row < last; row++) {
        const char *values = (const char *)job->values + size * first_value(job, row);
        char *to = (char *)job->outputs + out_size * row * job->ins;
        if (spread) spread_scales(job, row, spread, 0, 64 * job->words_per_row);
        for (int64_t w = 0; w < job->words_per_row; w++, to += 64 * out_size) {
            uint64_t mask = MASK(job->words[row * job->words_per_row + w]);
            int64_t count = job->ins - 64 * w < 64 ? job->ins - 64 * w : 64;
#if SPLIT
            if (out_size == 2 && VALUE_TYPE == job->input_type && count == 64) {
                int half = 2 * __builtin_popcountll(mask & 0xffffffff);
                _mm512_storeu_si512(to, expand_words(mask & 0xffffffff, (const uint16_t *)values));
                _mm512_storeu_si512(to + 64, expand_words(mask >> 32, (const uint16_t *)(values + half)));
                values += 2 * __builtin_popcountll(mask);
                continue;
            }
#endif
            values = natural(mask, values, lanes);
            if (spread)
                for (int i = 0; i < 64; i++) lanes[i] *= spread[64 * w + i];
            if (job->input_type == FP32)
                memcpy(to, lanes, sizeof(float) * (size_t)count);
            else
                for (int64_t i = 0; i < count; i++) store_number(to, i, (int)job->input_type, lanes[i]);
        }
    }
    free(spread);
}

/* outputs (O, I), of input_type = the dense weight. */
void expand(const Job *job, Parallel parallel) {
    if (job->outs) divide(job, expand_rows, cut_rows, shares_of(job), parallel);
}
