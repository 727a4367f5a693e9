/* Sixteen-bit numbers, and a product as the parts that compute it see it. */

#ifndef OPT_PRODUCT_H
#define OPT_PRODUCT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline float float_of(uint16_t bfloat16) {
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even. */
static inline uint16_t bfloat16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct product {
    size_t M, D, F;
    const void *matrix;
    const float *scales;     /* (F,) of 8-bit integers, or NULL */
    const uint16_t *groups;  /* (F, D / 32, 2) in bfloat16: scale and offset of each group of 4-bit integers, or NULL */
    const float *floats;     /* inputs, (M, D) */
    const uint8_t *integers; /* rounded inputs with 128 added, (M, D), and the large ones likewise behind them */
    const float *steps;      /* what they are multiplied by */
    int has_large;
    const struct int4_block *blocks; /* inputs as opt_int4_rows wants them, (M, D / 64, rounded up), or NULL */
    const float *group_sums;         /* sums of 32 of those, (M, SUMS_APART(D)); or what order_inputs makes */
    float *sums; /* (M, F), where outputs are float32 these */
    const void *bias;
    int bias_type;
    void *outputs;
    int output_type;
};

/* 4-bit integers of a row with a scale and an offset of their own. */
#define GROUP 32

/* Sixty-four inputs: those at even places and those at odd ones in bfloat16. */
struct int4_block {
    uint16_t even[32], odd[32];
};

/* Numbers from one row's sums of groups to the next: a whole count of sixteen. */
#define SUMS_APART(D) (((D) + 511) / 512 * 16)

/* The product with 4-bit integers, and whether the processor has the instructions for it. */
int opt_int4_works(void);
void opt_int4_inputs(const struct product *, struct int4_block *, float *group_sums);
void opt_int4_rows(const struct product *, size_t first, size_t last);

#endif
