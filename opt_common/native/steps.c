/* The steps of a decoder, run by one call: what lies between the products takes less time than a call from Python. */

#include "steps.h"

#include <math.h>
#include <string.h>

#include "product.h"
#include "products.h"

/* Sums that a row's numbers go to in turns: one alone would have each addition wait for the one before. */
#define SUMS 16

/* Numbers that are widened at a time. */
#define BLOCK 512

static inline const void *at(int64_t address) { return (const void *)(intptr_t)address; }

static inline size_t size_of(int type) { return type == BFLOAT16 ? sizeof(uint16_t) : sizeof(float); }

/* Numbers as float32: where they are, or else in `space`. */
static const float *widened(int type, const void *from, size_t count, float *space) {
    if (type != BFLOAT16) return from;
    for (size_t i = 0; i < count; i++) space[i] = float_of(((const uint16_t *)from)[i]);
    return space;
}

static void narrow(const float *from, size_t count, void *to) {
    for (size_t i = 0; i < count; i++) ((uint16_t *)to)[i] = bfloat16_of(from[i]);
}

static const void *further(int type, const void *from, size_t count) {
    return (const char *)from + count * size_of(type);
}

static float sum_of(const float *sums) {
    float total = 0;
    for (int i = 0; i < SUMS; i++) total += sums[i];
    return total;
}

/* One row: (inputs - mean) / sqrt(variance + epsilon) * weight + bias. */
static void norm_row(int type, size_t D, const void *inputs, const void *weight, const void *bias, float epsilon,
                     void *outputs) {
    float space[BLOCK], weights[BLOCK], biases[BLOCK], sums[SUMS] = {0}, squares[SUMS] = {0};
    for (size_t k = 0; k < D; k += BLOCK) {
        size_t count = D - k < BLOCK ? D - k : BLOCK;
        const float *numbers = widened(type, further(type, inputs, k), count, space);
        for (size_t i = 0; i < count / SUMS * SUMS; i += SUMS)
            for (size_t s = 0; s < SUMS; s++) sums[s] += numbers[i + s];
        for (size_t i = count / SUMS * SUMS; i < count; i++) sums[0] += numbers[i];
    }
    float mean = sum_of(sums) / (float)D;
    /* The variance from a second look: the mean of squares less the square of the mean would cancel. */
    for (size_t k = 0; k < D; k += BLOCK) {
        size_t count = D - k < BLOCK ? D - k : BLOCK;
        const float *numbers = widened(type, further(type, inputs, k), count, space);
        for (size_t i = 0; i < count / SUMS * SUMS; i += SUMS)
            for (size_t s = 0; s < SUMS; s++) squares[s] += (numbers[i + s] - mean) * (numbers[i + s] - mean);
        for (size_t i = count / SUMS * SUMS; i < count; i++) squares[0] += (numbers[i] - mean) * (numbers[i] - mean);
    }
    float factor = 1 / sqrtf(sum_of(squares) / (float)D + epsilon);
    for (size_t k = 0; k < D; k += BLOCK) {
        size_t count = D - k < BLOCK ? D - k : BLOCK;
        const float *numbers = widened(type, further(type, inputs, k), count, space);
        const float *w = weight ? widened(type, further(type, weight, k), count, weights) : NULL;
        const float *b = bias ? widened(type, further(type, bias, k), count, biases) : NULL;
        float *to = type == BFLOAT16 ? space : (float *)outputs + k;
        for (size_t i = 0; i < count; i++) to[i] = (numbers[i] - mean) * factor;
        if (w)
            for (size_t i = 0; i < count; i++) to[i] *= w[i];
        if (b)
            for (size_t i = 0; i < count; i++) to[i] += b[i];
        if (type == BFLOAT16) narrow(to, count, (uint16_t *)outputs + k);
    }
}

static void layer_norm(int type, size_t M, size_t D, const void *inputs, const void *weight, const void *bias,
                       float epsilon, void *outputs) {
    for (size_t m = 0; m < M; m++)
        norm_row(type, D, further(type, inputs, m * D), weight, bias, epsilon, (char *)outputs + m * D * size_of(type));
}

static void add(int type, size_t count, const void *left, const void *right, void *outputs) {
    if (type == BFLOAT16) {
        const uint16_t *a = left, *b = right;
        for (size_t i = 0; i < count; i++) ((uint16_t *)outputs)[i] = bfloat16_of(float_of(a[i]) + float_of(b[i]));
    } else {
        const float *a = left, *b = right;
        for (size_t i = 0; i < count; i++) ((float *)outputs)[i] = a[i] + b[i];
    }
}

static void scale(int type, size_t M, size_t D, const void *inputs, size_t apart, float factor, void *outputs) {
    for (size_t m = 0; m < M; m++)
        for (size_t i = 0; i < D; i++)
            if (type == BFLOAT16)
                ((uint16_t *)outputs)[m * D + i] = bfloat16_of(float_of(((const uint16_t *)inputs)[m * apart + i]) * factor);
            else
                ((float *)outputs)[m * D + i] = ((const float *)inputs)[m * apart + i] * factor;
}

/* What is not a number stays so. */
static void relu(int type, size_t count, const void *inputs, void *outputs) {
    if (type == BFLOAT16) {
        const uint16_t *from = inputs;
        for (size_t i = 0; i < count; i++) ((uint16_t *)outputs)[i] = from[i] > 0x8000 && from[i] <= 0xff80 ? 0 : from[i];
    } else {
        const float *from = inputs;
        for (size_t i = 0; i < count; i++) ((float *)outputs)[i] = from[i] < 0 ? 0 : from[i];
    }
}

struct run {
    int threads, result;
    run_team *team;
    const struct operation *operations;
    size_t count;
};

static int compute(const struct operation *o, int threads, run_team *team) {
    const int64_t *a = o->arguments;
    int type = (int)a[0];
    switch (o->name) {
    case PRODUCT:
        return opt_product(type, threads, team, a[1], a[2], a[3], at(a[4]), (int)a[5], at(a[6]), at(a[7]), at(a[8]),
                           (int)a[9], (void *)at(a[10]), (int)a[11]);
    case ATTENTION:
        return opt_attention(threads, team, a[1], a[2], a[3], a[4], *(const int64_t *)at(a[5]), at(a[6]), a[7], at(a[8]),
                             at(a[9]), a[10], type, at(a[11]), a[12], (void *)at(a[13]), (void *)at(a[14]), FLOAT32,
                             (void *)at(a[15]));
    case LAYER_NORM:
        layer_norm(type, a[1], a[2], at(a[3]), at(a[4]), at(a[5]), (float)o->number, (void *)at(a[6]));
        return 0;
    case ADD:
        add(type, a[1], at(a[2]), at(a[3]), (void *)at(a[4]));
        return 0;
    case SCALE:
        scale(type, a[1], a[2], at(a[3]), a[4], (float)o->number, (void *)at(a[5]));
        return 0;
    case RELU:
        relu(type, a[1], at(a[2]), (void *)at(a[3]));
        return 0;
    default:
        return -1;
    }
}

static void compute_all(void *argument) {
    struct run *run = argument;
    for (size_t i = 0; run->result == 0 && i < run->count; i++)
        run->result = compute(&run->operations[i], run->threads, run->team);
}

int opt_run(int threads, run_team *team, const struct operation *operations, size_t count) {
    struct run run = {.threads = threads, .team = team, .operations = operations, .count = count};
    opt_hold_together(compute_all, &run, opt_count_of_threads(threads, SIZE_MAX), team);
    return run.result;
}
