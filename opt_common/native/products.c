/* Products of a few rows of inputs with a matrix, on a CPU: what decoding consists of.

   A matrix is (F, D) in rows, or (D, F) in columns; the result is (M, F) = inputs (M, D) times the matrix, plus bias.
   The sums are float32, whatever the types are. */

#include "products.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

#define LANES 16
/* Not merged into what calls it, where the compiler would run out of registers. */
#define ALONE __attribute__((noinline))

/* A loop with so few turns that each has its own registers. */
#define UNROLLED _Pragma("GCC unroll 16")

typedef float floats __attribute__((vector_size(LANES * sizeof(float))));

struct product {
    size_t M, D, F;
    const void *matrix;
    const float *scales;     /* (F,) of integers, or NULL */
    const float *floats;     /* inputs, (M, D) */
    const uint8_t *integers; /* rounded inputs with 128 added, (M, D), and the large ones likewise behind them */
    const float *steps;      /* what they are multiplied by */
    int has_large;
    float *sums; /* (M, F), where outputs are float32 these */
    const void *bias;
    int bias_type;
    void *outputs;
    int output_type;
};

/* What is compiled for one instruction set. */
struct set {
    int (*round_inputs)(const struct product *, float *rest, uint8_t *integers, float *steps);
    void (*finish)(const struct product *, size_t first, size_t last);
    void (*rows[KINDS])(const struct product *, size_t first, size_t last);
    void (*columns[KINDS])(const struct product *, float *to, size_t first, size_t last);
};

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

#define WIDE_INTEGERS 0
#define NAME(name) plain_##name
#include "one_set.h"
#undef NAME

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_SETS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(name) avx2_##name
#include "one_set.h"
#undef NAME
#pragma GCC pop_options

#undef WIDE_INTEGERS
#define WIDE_INTEGERS 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#define NAME(name) avx512_##name
#include "one_set.h"
#undef NAME
#pragma GCC pop_options
#endif

static const struct set *best_set(void) {
#ifdef HAS_SETS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return &avx512_set;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_set;
#endif
    return &plain_set;
}

struct job {
    struct product product;
    const struct set *set;
    int kind;
};

static void run_rows(void *argument, int index, int count) {
    const struct job *job = argument;
    size_t F = job->product.F, blocks = (F + LANES - 1) / LANES;
    size_t first = blocks * index / count * LANES, last = blocks * (index + 1) / count * LANES;
    job->set->rows[job->kind](&job->product, first, last < F ? last : F);
}

static void run_columns(void *argument, int index, int count) {
    const struct job *job = argument;
    const struct product *p = &job->product;
    job->set->columns[job->kind](p, p->sums + index * p->M * p->F, p->D * index / count, p->D * (index + 1) / count);
}

int opt_product(int kind, int threads, run_team *team, size_t M, size_t D, size_t F, const void *inputs, int input_type,
                const void *matrix, const float *scales, const void *bias, int bias_type, void *outputs,
                int output_type) {
    if (kind < 0 || kind >= KINDS || M > MAX_ROWS) return -1;
    if (M == 0 || F == 0) return 0;
    struct job job = {.set = best_set(), .kind = kind};
    struct product *p = &job.product;
    *p = (struct product){
        .M = M, .D = D, .F = F, .matrix = matrix, .scales = scales, .bias = bias,
        .bias_type = bias_type, .outputs = outputs, .output_type = output_type,
    };
    threads = opt_count_of_threads(threads);
    int by_rows = job.set->rows[kind] != NULL;
    size_t rounded = kind == INT8_DYNAMIC_ROWS ? M * D : 0;
    size_t widened = input_type == BFLOAT16 ? M * D : 0;
    size_t summed = !by_rows ? threads * M * F : output_type == BFLOAT16 ? M * F : 0;
    /* Numbers of four bytes before those of one. */
    float *space = malloc((widened + summed + (rounded ? D : 0) + 2 * M) * sizeof(float) + 2 * rounded);
    if (!space) return -1;
    float *wide = space, *sums = wide + widened, *rest = sums + summed, *steps = rest + (rounded ? D : 0);
    p->sums = summed ? sums : outputs;
    for (size_t i = 0; i < widened; i++) wide[i] = float_of(((const uint16_t *)inputs)[i]);
    p->floats = widened ? wide : inputs;
    if (rounded) {
        uint8_t *integers = (uint8_t *)(steps + 2 * M);
        p->has_large = job.set->round_inputs(p, rest, integers, steps);
        p->integers = integers;
        p->steps = steps;
    }
    if (by_rows)
        opt_run_parts(run_rows, &job, threads, team);
    else {
        int count = opt_run_parts(run_columns, &job, threads, team);
        float *total = output_type == BFLOAT16 ? sums : outputs;
        for (size_t i = 0; i < M * F; i++) {
            float sum = sums[i];
            for (int other = 1; other < count; other++) sum += sums[other * M * F + i];
            total[i] = sum;
        }
        p->sums = total;
        job.set->finish(p, 0, F);
    }
    free(space);
    return 0;
}

/* VERSION of opt_common/native/__init__.py: what has to be another number when arguments change. */
int opt_version(void) { return 1; }
