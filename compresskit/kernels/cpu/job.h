/* What is to be multiplied, and how its rows are divided among threads.
 *
 * Shapes: N = tokens, O = outputs, I = inputs, W = words of a row = ceil(I / 64), G = groups of scales.
 */
#ifndef COMPRESSKIT_JOB_H
#define COMPRESSKIT_JOB_H

#include "numbers.h"

typedef struct {
    const void *inputs; /* (N, I) of input_type */
    void *outputs; /* (N, O) of input_type */
    const void *bias; /* (O) of bias_type, or none */
    const uint64_t *words; /* (O, W): what says where a row's values belong */
    const void *values; /* of VALUE_TYPE; 64 bytes may be read from where any begins */
    const int64_t *starts; /* (O + 1): of a row's values; none where every row has as many */
    const float *scales; /* (O, G), or none */
    void *arranged; /* room for (N and as many as fill the last block, 64 W) numbers of fp32 */
    int64_t tokens, outs, ins, words_per_row, groups;
    int64_t input_type, bias_type, threads;
} Job;

/* OpenMP's own entry, as whoever loads this file found it in the process; none where there is none. */
typedef void (*Parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

typedef void (*Part)(const Job *job, int64_t first, int64_t last);

typedef struct {
    const Job *job;
    Part part;
    int64_t (*cut)(const Job *job, int64_t share, int64_t shares);
    int64_t shares, next;
} Team;

/* However many threads come: each takes the next share until none is left. */
static void work(void *data) {
    Team *team = data;
    int64_t share;
    while ((share = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->shares) {
        int64_t first = team->cut(team->job, share, team->shares);
        int64_t last = team->cut(team->job, share + 1, team->shares);
        if (first < last) team->part(team->job, first, last);
    }
}

static void divide(
    const Job *job, Part part, int64_t (*cut)(const Job *, int64_t, int64_t), int64_t shares, Parallel parallel
) {
    Team team = {job, part, cut, job->threads > 1 && parallel ? shares : 1, 0};
    if (team.shares > 1)
        parallel(work, &team, (unsigned)job->threads, 0);
    else
        work(&team);
}

/* The row before which ``share`` of ``shares`` of all work is done, where the work of a row is to read its
 * values and its words. */
static int64_t cut_rows(const Job *job, int64_t share, int64_t shares) {
    if (share >= shares) return job->outs;
    if (!job->starts) return job->outs * share / shares;
    int64_t size = VALUE_BYTES, row_bytes = 8 * job->words_per_row, low = 0, high = job->outs;
    double all = (double)(size * (job->starts[job->outs] - job->starts[0]) + row_bytes * job->outs);
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if ((double)(size * (job->starts[middle] - job->starts[0]) + row_bytes * middle) < all * share / shares)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Several for each thread, for none knows what else the cores have to do. */
static int64_t shares_of(const Job *job) {
    int64_t most = (job->outs + 7) / 8, wanted = 8 * job->threads;
    return most < wanted ? most : wanted;
}

static int64_t cut_tokens(const Job *job, int64_t share, int64_t shares) {
    return job->tokens * share / shares;
}

#endif
