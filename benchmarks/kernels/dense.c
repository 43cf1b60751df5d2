/* The yardstick of packed weights: a dense bf16 weight times one token, which does nothing but read it.
 *
 * Compiled and threaded as the kernels are; ``values`` are the weight, (O, I), and ``arranged`` the inputs.
 */
#include "job.h"

#define MASK(word) (word)
INLINE int64_t first_value(const Job *job, int64_t row) { return row * job->ins; }
#include "linear.h"

#if HAS_DOT
static void multiply(const Job *job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const uint16_t *weights = (const uint16_t *)job->values + row * job->ins, *inputs = job->inputs;
        vec sums[8];
        UNROLL for (int c = 0; c < 8; c++) sums[c] = zeros();
        for (int64_t i = 0; i < job->ins; i += 256) {
            for (int line = 0; line < 8; line++) __builtin_prefetch(weights + i + 32 * line + FAR_BYTES / 2);
            UNROLL for (int c = 0; c < 8; c++)
                sums[c] = add_dot(sums[c], _mm512_loadu_si512(weights + i + 32 * c), inputs + i + 32 * c);
        }
        for (int c = 1; c < 8; c++) sums[0] = plus(sums[0], sums[c]);
        store_number(job->outputs, row, BF16, total(sums[0]));
    }
}
#else
static void multiply(const Job *job, int64_t first, int64_t last) {
    const float *inputs = job->arranged;
    for (int64_t row = first; row < last; row++) {
        const uint16_t *weights = (const uint16_t *)job->values + row * job->ins;
        float sums[64] = {0}, sum = 0;
        for (int64_t i = 0; i < job->ins; i += 64)
            for (int c = 0; c < 64; c++) sums[c] += bf16_to_float(weights[i + c]) * inputs[i + c];
        for (int c = 0; c < 64; c++) sum += sums[c];
        store_number(job->outputs, row, BF16, sum);
    }
}
#endif

/* outputs (O) = weight @ inputs, I a multiple of 256. */
void dense(const Job *job, Parallel parallel) {
#if !HAS_DOT
    for (int64_t i = 0; i < job->ins; i++)
        ((float *)job->arranged)[i] = bf16_to_float(((const uint16_t *)job->inputs)[i]);
#endif
    divide(job, multiply, cut_rows, shares_of(job), parallel);
}
