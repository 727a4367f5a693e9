/* Products of a few rows of inputs with a matrix. */

#ifndef OPT_PRODUCTS_H
#define OPT_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

#include "threads.h"

/* How a matrix is stored. These numbers and the next are those of opt_common/native/__init__.py. */
enum {
    FLOAT32_ROWS,      /* (F, D) */
    BFLOAT16_ROWS,     /* (F, D) */
    INT8_ROWS,         /* (F, D), with a scale for each row */
    INT8_DYNAMIC_ROWS, /* the same, for inputs that are rounded too */
    FLOAT32_COLUMNS,   /* (D, F) */
    BFLOAT16_COLUMNS,  /* (D, F) */
    KINDS
};

/* Types of inputs, bias and outputs. */
enum { FLOAT32, BFLOAT16 };

/* Rows of inputs that a call takes at most. */
#define MAX_ROWS 16

/* Inputs beyond this are rounded by themselves: opt_common.quantization.OUTLIER. */
#define OUTLIER 6.0f

/* outputs (M, F) = inputs (M, D) times the matrix, and bias (F,), or none where that is NULL.

   All are dense, in C order. `threads` work on it, 0 meaning as many as there are processors to run on; see threads.h
   for the team. Returns 0, or -1 where there is no memory or an argument has no meaning. */
int opt_product(int kind, int threads, run_team *team, size_t M, size_t D, size_t F, const void *inputs, int input_type,
                const void *matrix, const float *scales, const void *bias, int bias_type, void *outputs,
                int output_type);

#endif
