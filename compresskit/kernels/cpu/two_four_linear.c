/* The layout ``two_four``: of a word four bits are the two places of four inputs, and a word has 32 values. */
#include "job.h"

/* Four bits of places -> which two of four inputs the values belong to. (p, p) is one kept weight, whose
 * other value, a zero, takes another place; places that fall are none, and both values are zeros. */
#define PAIR(low, high) \
    ((low) == (high) ? ((low) == 3 ? 9 : 3 << (low)) : 1 << (low) | 1 << (high))
#define PAIRS(high) PAIR(0, high), PAIR(1, high), PAIR(2, high), PAIR(3, high)
static const uint8_t KEPT[16] = {PAIRS(0), PAIRS(1), PAIRS(2), PAIRS(3)};

#if defined(__SSSE3__)
#include <immintrin.h>
INLINE uint64_t mask_of(uint64_t word) {
    const __m128i kept = _mm_loadu_si128((const __m128i *)KEPT), fours = _mm_set1_epi8(15);
    __m128i places = _mm_cvtsi64_si128((long long)word);
    __m128i low = _mm_shuffle_epi8(kept, _mm_and_si128(places, fours));
    __m128i high = _mm_shuffle_epi8(kept, _mm_and_si128(_mm_srli_epi64(places, 4), fours));
    return (uint64_t)_mm_cvtsi128_si64(_mm_or_si128(low, _mm_slli_epi64(high, 4)));
}
#else
INLINE uint64_t mask_of(uint64_t word) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += 4) mask |= (uint64_t)KEPT[word >> i & 15] << i;
    return mask;
}
#endif
#define MASK(word) mask_of(word)

INLINE int64_t first_value(const Job *job, int64_t row) { return 32 * row * job->words_per_row; }

#include "linear.h"
