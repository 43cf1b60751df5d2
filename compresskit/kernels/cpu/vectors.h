/* Vectors of fp32 and what puts kept values in their places, for the instructions that this file is compiled
 * with: AVX-512 with VBMI2 and BF16 or without, AVX2, or none.
 *
 * decode_T(out, mask, values) fills the vectors of one step: input i of the step is the next of ``values``
 * where bit i of ``mask`` is one, and zero where it is not. STEP_T inputs are a step; of a step VECTORS_T
 * vectors are made. No more than 64 bytes are read from ``values``. bf16 values by VBMI2 come as the even and
 * the odd inputs of 32, which SPLIT tells: whoever multiplies by them has to lay out his own numbers so.
 */
#ifndef COMPRESSKIT_VECTORS_H
#define COMPRESSKIT_VECTORS_H

#include "numbers.h"

#define SPLIT 0
#define HAS_DOT 0

#if defined(__AVX512F__)
#define LANES 16
typedef __m512 vec;
INLINE vec zeros(void) { return _mm512_setzero_ps(); }
INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
INLINE vec all(float a) { return _mm512_set1_ps(a); }
INLINE vec times(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec plus(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec add_product(vec sum, vec a, vec b) { return _mm512_fmadd_ps(a, b, sum); }
INLINE float total(vec a) { return _mm512_reduce_add_ps(a); }
/* The totals of four vectors, for each quarter of their lanes. */
INLINE vec quarters(const vec *a) {
    vec low = plus(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    vec high = plus(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    __m512d one = _mm512_castps_pd(low), other = _mm512_castps_pd(high);
    return plus(
        _mm512_castpd_ps(_mm512_unpacklo_pd(one, other)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, other))
    );
}
INLINE vec neighbours(vec a, vec b) {
    return plus(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
INLINE vec totals(const vec *a) {
    vec low = neighbours(quarters(a), quarters(a + 4)), high = neighbours(quarters(a + 8), quarters(a + 12));
    return neighbours(low, high);
}
#define HAS_TOTALS 1

/* Zeros that an expansion is merged into. The form that makes its own zeros waits on some processors for the
 * last use of the register that it writes: the compiler must not see that these are zeros. */
INLINE __m512i blank(void) {
    __m512i none = _mm512_setzero_si512();
    __asm__("" : "+v"(none));
    return none;
}

#define STEP_f32 16
#define VECTORS_f32 1
INLINE void decode_f32(vec *out, uint64_t mask, const float *values) {
    out[0] = _mm512_mask_expand_ps(_mm512_castsi512_ps(blank()), (__mmask16)mask, _mm512_loadu_ps(values));
}

#if defined(__AVX512VBMI2__)
#undef SPLIT
#define SPLIT 1
INLINE __m512i expand_words(uint64_t mask, const uint16_t *values) {
    return _mm512_mask_expand_epi16(blank(), (__mmask32)mask, _mm512_loadu_si512(values));
}
#define STEP_bf16 32
#define VECTORS_bf16 2
INLINE void decode_bf16(vec *out, uint64_t mask, const uint16_t *values) {
    __m512i words = expand_words(mask, values);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}
#define STEP_f16 32
#define VECTORS_f16 2
INLINE void decode_f16(vec *out, uint64_t mask, const uint16_t *values) {
    __m512i words = expand_words(mask, values);
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
}
#define STEP_i8 64
#define VECTORS_i8 4
INLINE vec quarter(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
INLINE void decode_i8(vec *out, uint64_t mask, const int8_t *values) {
    __m512i bytes = _mm512_mask_expand_epi8(blank(), (__mmask64)mask, _mm512_loadu_si512(values));
    out[0] = quarter(_mm512_castsi512_si128(bytes));
    out[1] = quarter(_mm512_extracti32x4_epi32(bytes, 1));
    out[2] = quarter(_mm512_extracti32x4_epi32(bytes, 2));
    out[3] = quarter(_mm512_extracti32x4_epi32(bytes, 3));
}
#else
#define STEP_bf16 16
#define VECTORS_bf16 1
INLINE void decode_bf16(vec *out, uint64_t mask, const uint16_t *values) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values));
    wide = _mm512_slli_epi32(_mm512_mask_expand_epi32(blank(), (__mmask16)mask, wide), 16);
    out[0] = _mm512_castsi512_ps(wide);
}
#define STEP_f16 16
#define VECTORS_f16 1
INLINE void decode_f16(vec *out, uint64_t mask, const uint16_t *values) {
    vec wide = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)values));
    out[0] = _mm512_mask_expand_ps(_mm512_castsi512_ps(blank()), (__mmask16)mask, wide);
}
#define STEP_i8 16
#define VECTORS_i8 1
INLINE void decode_i8(vec *out, uint64_t mask, const int8_t *values) {
    __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)values));
    out[0] = _mm512_cvtepi32_ps(_mm512_mask_expand_epi32(blank(), (__mmask16)mask, wide));
}
#endif

#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
/* Pairs of bf16 are multiplied and added in fp32, each product exactly; denormal numbers count as zero. */
#undef HAS_DOT
#define HAS_DOT 1
typedef __m512i words_t;
INLINE vec add_dot(vec sum, words_t weights, const uint16_t *inputs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(inputs));
}
#endif

#else /* eight lanes, each byte of a mask at a time */
#define LANES 8
#define STEP_f32 8
#define VECTORS_f32 1
#define STEP_bf16 8
#define VECTORS_bf16 1
#define STEP_f16 8
#define VECTORS_f16 1
#define STEP_i8 8
#define VECTORS_i8 1

#if defined(__AVX2__) && defined(__FMA__)
#include "places.h"
typedef __m256 vec;
INLINE vec zeros(void) { return _mm256_setzero_ps(); }
INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
INLINE vec all(float a) { return _mm256_set1_ps(a); }
INLINE vec times(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec plus(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec add_product(vec sum, vec a, vec b) { return _mm256_fmadd_ps(a, b, sum); }
INLINE float total(vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
/* A lane takes the value whose number its mask byte's row of the table says; none where that is negative. */
INLINE vec spread(uint64_t mask, vec packed) {
    __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)PLACES[mask & 255]));
    vec put = _mm256_permutevar8x32_ps(packed, from);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(from, 31)), put);
}
INLINE void decode_f32(vec *out, uint64_t mask, const float *values) {
    out[0] = spread(mask, _mm256_loadu_ps(values));
}
INLINE void decode_bf16(vec *out, uint64_t mask, const uint16_t *values) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)values));
    out[0] = spread(mask, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
INLINE void decode_f16(vec *out, uint64_t mask, const uint16_t *values) {
    out[0] = spread(mask, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)values)));
}
INLINE void decode_i8(vec *out, uint64_t mask, const int8_t *values) {
    __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)values));
    out[0] = spread(mask, _mm256_cvtepi32_ps(wide));
}
#else
typedef float vec __attribute__((vector_size(32)));
INLINE vec zeros(void) { return (vec){0}; }
INLINE vec load(const float *p) {
    vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void store(float *p, vec a) { memcpy(p, &a, sizeof a); }
INLINE vec all(float a) { return (vec){a, a, a, a, a, a, a, a}; }
INLINE vec times(vec a, vec b) { return a * b; }
INLINE vec plus(vec a, vec b) { return a + b; }
INLINE vec add_product(vec sum, vec a, vec b) { return sum + a * b; }
INLINE float total(vec a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
#define DECODE(name, type, widen)                                       \
    INLINE void decode_##name(vec *out, uint64_t mask, const type *values) { \
        float lanes[8];                                                 \
        for (int i = 0, taken = 0; i < 8; i++) {                        \
            int kept = mask >> i & 1;                                   \
            float value = widen(values[taken]);                         \
            lanes[i] = kept ? value : 0;                                \
            taken += kept;                                              \
        }                                                               \
        out[0] = load(lanes);                                           \
    }
DECODE(f32, float, (float))
DECODE(bf16, uint16_t, bf16_to_float)
DECODE(f16, uint16_t, fp16_to_float)
DECODE(i8, int8_t, (float))
#undef DECODE
#endif
#endif

#endif
