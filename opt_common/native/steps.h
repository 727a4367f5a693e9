/* A step of a decoder as the list of what it computes. */

#ifndef OPT_STEPS_H
#define OPT_STEPS_H

#include <stddef.h>
#include <stdint.h>

#include "threads.h"

/* What an operation computes. These numbers are those of opt_common/native/__init__.py. */
enum {
    PRODUCT,    /* arguments are those of opt_product after its team */
    ATTENTION,  /* those of opt_attention after its team, in another order; the slot is where a pointer points */
    LAYER_NORM, /* type, rows, width, inputs, weight or NULL, bias or NULL, outputs; the number is epsilon */
    ADD,        /* type, count, left, right, outputs */
    SCALE,      /* type, rows, width, inputs, numbers from one row of them to the next, outputs; times the number */
    RELU,       /* type, count, inputs, outputs */
};

#define ARGUMENTS 16

struct operation {
    int64_t name;
    int64_t arguments[ARGUMENTS]; /* numbers, and addresses */
    double number;
};

/* Compute one after the other. Threads, team and result are those of opt_product. */
int opt_run(int threads, run_team *team, const struct operation *operations, size_t count);

#endif
