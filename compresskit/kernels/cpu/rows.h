/* The product of rows of a packed weight with tokens, for one type of values; included once for each.
 *
 * Of whoever includes it: NAME; VALUE, their C type; STEP, VECTORS and DECODE (see vectors.h); WEIGHT, a
 * vector of weights; NUMBER, the type of arranged inputs, WIDTH of which a vector takes; ADD(sum, weight,
 * inputs); HAS_SCALES; ARRANGE(job, first, count, to), which writes some inputs as NUMBERs; and MASK(word),
 * the mask bits of 64 inputs.
 *
 * Inputs are taken in blocks that stay in the first cache, and of up to 16 tokens, whose sums stay in
 * registers while a row's weights are decoded once for all of them.
 */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define OWN(name) JOIN(name, NAME)
#define LINES (VALUE_BYTES == 4 ? 3 : 2)
#define PER_WORD (64 / STEP * VECTORS)
#define CHAINS(tokens) ((tokens) == 1 ? 8 : (tokens) < MOST_TOKENS ? MOST_TOKENS / (tokens) : 1)

/* Adds the products of 64 inputs; a sum has several chains of additions, so that none waits for the last. */
INLINE const VALUE *OWN(word)(
    const int tokens, const int each, const int chain, vec *sums, uint64_t mask, const VALUE *values,
    const NUMBER *inputs, const float *scales, int64_t ahead
) {
    const int chains = CHAINS(tokens);
    /* Values of one word may take one line more than on average, and what is left out here is waited for. */
    UNROLL for (int line = 0; line < LINES; line++)
        __builtin_prefetch((const char *)values + ahead + 64 * line);
    UNROLL for (int step = 0; step < 64 / STEP; step++) {
        WEIGHT weights[VECTORS];
        uint64_t part = mask >> step * STEP % 64 & ~(uint64_t)0 >> (64 - STEP);
        DECODE(weights, part, values);
        values += __builtin_popcountll(part);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const int at = step * STEP + v * WIDTH;
#if HAS_SCALES
            if (each) weights[v] = times(weights[v], load(scales + at));
#else
            (void)each, (void)scales;
#endif
            UNROLL for (int t = 0; t < tokens; t++) {
                vec *sum = sums + t * chains + (chain + step * VECTORS + v) % chains;
                *sum = ADD(*sum, weights[v], inputs + t * 64 + at);
            }
        }
    }
    return values;
}

/* Sums over ``count`` words of one row, added to out[token]; ``per_scale`` words have one scale. */
INLINE const VALUE *OWN(row)(
    const int tokens, const int each, const uint64_t *words, int64_t count, int64_t per_scale,
    const VALUE *values, const NUMBER *inputs, const float *scales, float *out, int64_t ahead
) {
    const int chains = CHAINS(tokens);
    for (int64_t w = 0, until; w < count; w = until, scales++) {
        vec sums[16];
        UNROLL for (int i = 0; i < tokens * chains; i++) sums[i] = zeros();
        until = count - w < per_scale ? count : w + per_scale;
        for (; tokens == 1 && w + 1 < until; w += 2) {
            values = OWN(word)(
                tokens, each, 0, sums, MASK(words[w]), values, inputs + 64 * w, scales + 64 * w, ahead
            );
            values = OWN(word)(
                tokens, each, PER_WORD, sums, MASK(words[w + 1]), values, inputs + 64 * w + 64,
                scales + 64 * w + 64, ahead
            );
        }
        for (; w < until; w++) {
            values = OWN(word)(
                tokens, each, 0, sums, MASK(words[w]), values, inputs + 64 * tokens * w, scales + 64 * w, ahead
            );
        }
        float scale = HAS_SCALES && !each ? *scales : 1;
        UNROLL for (int t = 0; t < tokens; t++) {
            vec sum = sums[t * chains];
            UNROLL for (int c = 1; c < chains; c++) sum = plus(sum, sums[t * chains + c]);
            sums[t] = sum;
        }
#ifdef HAS_TOTALS
        if (tokens == 16) {
            store(out, add_product(load(out), totals(sums), all(scale)));
            continue;
        }
#endif
        UNROLL for (int t = 0; t < tokens; t++) out[t] += total(sums[t]) * scale;
    }
    return values;
}

/* Up to ROWS rows with a block of tokens. */
static inline __attribute__((always_inline)) void OWN(block)(
    const int tokens, const int each, const Job *job, int64_t first, int64_t last, int64_t token, float *spread
) {
    const int64_t width = 64 * job->words_per_row, wide = job->words_per_row;
    const int grouped = HAS_SCALES && !each && job->groups > 1;
    const int64_t per_group = grouped ? job->ins / job->groups / 64 : wide, unit = grouped ? per_group : 1;
    const int64_t fits = CACHE_BYTES / (tokens * 64 * (int64_t)sizeof(NUMBER)) / unit * unit;
    const int64_t words = tokens <= 2 || fits > wide ? wide : fits ? fits : unit;
    const int64_t ahead = words == wide ? FAR_BYTES : NEAR_BYTES;
    const int64_t until = last + (last - first) < job->outs ? last + (last - first) : job->outs;
    const int64_t visits = (wide + words - 1) / words * (last - first);
    const int64_t next_bytes = (first_value(job, until) - first_value(job, last)) * VALUE_BYTES / visits;
    const char *next = (const char *)job->values + first_value(job, last) * VALUE_BYTES;
    const VALUE *values[ROWS];
    float out[ROWS][16] = {{0}};
    for (int64_t row = first; row < last; row++) values[row - first] = (const VALUE *)job->values + first_value(job, row);
    for (int64_t w = 0; w < wide; w += words) {
        int64_t count = wide - w < words ? wide - w : words;
        const NUMBER *inputs = (const NUMBER *)job->arranged + token * width + 64 * tokens * w;
        for (int64_t row = first; row < last; row++) {
            const float *scales = spread;
            if (words < wide && !token) next = prefetch(next, next_bytes);
            if (HAS_SCALES && !each) scales = job->scales + row * job->groups + w / per_group;
            if (HAS_SCALES && each) spread_scales(job, row, spread, 64 * w, 64 * (w + count));
            values[row - first] = OWN(row)(
                tokens, each, job->words + row * wide + w, count, per_group, values[row - first], inputs,
                HAS_SCALES && each ? spread + 64 * w : scales, out[row - first],
                ahead
            );
        }
    }
    for (int t = 0; t < tokens && token + t < job->tokens; t++)
        for (int64_t row = first; row < last; row++) {
            float bias = job->bias ? load_number(job->bias, row, (int)job->bias_type) : 0;
            store_number(
                job->outputs, (token + t) * job->outs + row, (int)job->input_type, out[row - first][t] + bias
            );
        }
}

static void OWN(part)(const Job *job, int64_t first, int64_t last) {
    const int each = HAS_SCALES && job->groups > 1 && job->ins / job->groups % 64;
    float *spread = each ? malloc(sizeof(float) * 64 * (size_t)job->words_per_row) : NULL;
    for (int64_t row = first, until; row < last; row = until) {
        until = last - row < ROWS ? last : row + ROWS;
        for (int64_t token = 0; token < job->tokens;) {
            int size = block_size(job->tokens - token);
            switch (size) {
#define CASE(n)                                                                                   \
    case n:                                                                                       \
        if (HAS_SCALES && each)                                                                   \
            OWN(block)(n, 1, job, row, until, token, spread);                                     \
        else                                                                                      \
            OWN(block)(n, 0, job, row, until, token, spread);                                     \
        break;
                CASE(1)
                CASE(2)
                CASE(4)
#if MOST_TOKENS > 4
                CASE(8)
#endif
#if MOST_TOKENS > 8
                CASE(16)
#endif
#undef CASE
            }
            token += size;
        }
    }
    free(spread);
}

/* Inputs of some tokens as NUMBERs, zeros after the last: of each block word by word, all its tokens. */
static void OWN(arrange)(const Job *job, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++) {
        int64_t block = token / MOST_TOKENS * MOST_TOKENS, size = block_size(job->tokens - block);
        NUMBER *to = (NUMBER *)job->arranged + 64 * (block * job->words_per_row + token - block);
        for (int64_t i = 0; i < job->ins; i += 64, to += 64 * size) {
            int64_t count = job->ins - i < 64 ? job->ins - i : 64;
            if (count < 64) memset(to, 0, 64 * sizeof(NUMBER));
            ARRANGE(job, token * job->ins + i, count, to);
        }
    }
}

/* What fills the last block: nobody reads its sums, but odd numbers in it could make them slow. */
static void OWN(fill)(const Job *job) {
    int64_t block = job->tokens / MOST_TOKENS * MOST_TOKENS, used = job->tokens - block;
    int64_t size = used ? block_size(used) : 0;
    NUMBER *to = (NUMBER *)job->arranged + 64 * block * job->words_per_row;
    for (int64_t w = 0; used < size && w < job->words_per_row; w++)
        memset(to + 64 * (w * size + used), 0, 64 * sizeof(NUMBER) * (size_t)(size - used));
}

static void OWN(linear)(const Job *job, Parallel parallel) {
    OWN(fill)(job);
    divide(job, OWN(arrange), cut_tokens, job->tokens < 8 ? 1 : job->tokens, parallel);
    divide(job, OWN(part), cut_rows, shares_of(job), parallel);
}

#undef NAME
#undef VALUE
#undef STEP
#undef VECTORS
#undef DECODE
#undef WEIGHT
#undef NUMBER
#undef WIDTH
#undef ADD
#undef HAS_SCALES
#undef ARRANGE
#undef OWN
#undef JOIN
#undef JOIN_
#undef LINES
#undef PER_WORD
#undef CHAINS
