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
    INT4_ROWS,         /* (F, D / 2), two to a byte, less 8, with a scale and an offset for each 32 in a row */
    FLOAT32_COLUMNS,   /* (D, F) */
    BFLOAT16_COLUMNS,  /* (D, F) */
    KINDS
};

/* Types of inputs, bias and outputs. */
enum { FLOAT32, BFLOAT16 };

/* Rows of inputs for which a matrix is read once; of more, so many at a time. */
#define MAX_ROWS 16

/* Inputs beyond this are rounded by themselves: opt_common.quantization.OUTLIER. */
#define OUTLIER 6.0f

/* outputs (M, F) = inputs (M, D) times the transposed matrix, and bias (F,), or none where that is NULL.

   All are dense, in C order. Scales are float32, (F,); those of INT4_ROWS are bfloat16 with the offsets, (F, D / 32, 2).
   `threads` work on it at most; see threads.h for what 0 means, and for the team. Returns 0, or
   -1 where there is no memory, a kind has no meaning, or rows of INT4_ROWS are no whole groups. */
int opt_product(int kind, int threads, run_team *team, size_t M, size_t D, size_t F, const void *inputs, int input_type,
                const void *matrix, const void *scales, const void *bias, int bias_type, void *outputs,
                int output_type);

/* Use no better instructions than these, for tests: 0 plain, 1 AVX2, 2 AVX-512. */
void opt_limit_set(int limit);

/* Whether there are better ones than plain C's. */
int opt_has_set(void);

/* Attention of one new token in each row: its key and value, (batch, heads * head_dim), go to `slot` of their buffers,
   (batch, capacity, heads, head_dim), and its query attends to that slot and all before it.

   Rows of queries are `row` numbers apart, those of keys and values `new_row`. The bias is added to the scores, one for
   each slot; rows of it are `bias_row` numbers apart, and it may be NULL. Outputs are (batch, heads * head_dim). Threads
   and result are those of opt_product. */
int opt_attention(int threads, run_team *team, size_t batch, size_t heads, size_t head_dim, size_t capacity, size_t slot,
                  const void *queries, size_t row, const void *new_keys, const void *new_values, size_t new_row,
                  int type, const void *bias, size_t bias_row, void *keys, void *values, int buffer_type, void *outputs);

/* Attention of a prompt, each of its tokens to those up to itself: scaled queries, keys and values (batch, tokens, heads,
   head_dim), tokens `apart` numbers from one another, to outputs that are dense. Threads and result are those of
   opt_product. */
int opt_prompt_attention(int threads, run_team *team, size_t batch, size_t tokens, size_t heads, size_t head_dim,
                         const void *queries, size_t query_apart, const void *keys, size_t key_apart,
                         const void *values, size_t value_apart, int type, void *outputs);

#endif
