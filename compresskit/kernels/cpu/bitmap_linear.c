/* The layout ``bitmap``: a word is the mask of 64 inputs, and every row says where its values begin. */
#include "job.h"

#define MASK(word) (word)

INLINE int64_t first_value(const Job *job, int64_t row) { return job->starts[row]; }

#include "linear.h"
