/* Products of a few rows of inputs with a matrix, on a CPU: what decoding consists of.

   A matrix is (F, D), or (D, F) where it is of columns; the result is (M, F) = inputs (M, D) times it, plus bias. The
   sums are float32, whatever the types are. */

#include "products.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "product.h"
#include "threads.h"

/* The numbers of a line of the cache. */
#define LINE 16

/* 4-bit integers that become numbers at a time. */
#define STRETCH 512

/* Not merged into what calls it, where the compiler would run out of registers. */
#define ALONE __attribute__((noinline))

/* Fetch what is read in the next row of a matrix: the operations of several rows of inputs take as long as memory does,
   and would otherwise wait for it. It does no harm where there is no next row. */
#define FETCH(from) __builtin_prefetch(from, 0, 2)

/* A loop with so few turns that each has its own registers. */
#define UNROLLED _Pragma("GCC unroll 16")

struct attention {
    size_t batch, heads, head_dim, capacity, slots;
    const float *queries;
    const void *keys, *values; /* of one type, the buffers' */
    const void *bias;
    size_t bias_row; /* numbers from one row of it to the next, 0 where one row serves all */
    int type;        /* of bias and outputs */
    void *outputs;
};

/* What some of the slots give to each head of each row: the largest score, the sum of the exponentials of scores less
   that, and the sum of values that these weigh. A total of 0 means that no slot has been looked at. */
struct share {
    float *peaks, *totals, *contexts;
};

/* Attention of the tokens of a prompt, each to those up to itself. */
struct prompt {
    size_t batch, tokens, heads, head_dim;
    const void *queries, *keys, *values;
    size_t query_apart, key_apart, value_apart; /* numbers from one token to the next */
    int type;                                   /* of all of them, and of outputs */
    void *outputs;
};

static inline float number_of(int type, const void *numbers, size_t at) {
    return type == BFLOAT16 ? float_of(((const uint16_t *)numbers)[at]) : ((const float *)numbers)[at];
}

/* What is compiled for one instruction set. */
struct set {
    size_t lanes; /* numbers in a vector */
    int (*round_inputs)(const struct product *, float *rest, uint8_t *integers, float *steps);
    void (*order_inputs)(const struct product *, float *ordered, float *group_sums);
    void (*finish)(const struct product *, size_t first, size_t last);
    /* By the type of the buffers. */
    void (*attend_slots[2])(const struct attention *, size_t b, size_t first, size_t last, float *scores,
                            const struct share *);
    void (*merge_shares)(const struct attention *, const struct share *, int count);
    size_t together; /* queries of a prompt */
    void (*attend_queries)(const struct prompt *, size_t b, size_t n, size_t first, const float *keys, const float *values,
                           float *space);
    void (*rows[KINDS])(const struct product *, size_t first, size_t last);
    void (*columns[KINDS])(const struct product *, float *to, size_t first, size_t last);
};

#define AVX2 1
#define AVX512 2

#define SET 0
#define LANES 8
#define NAME(name) plain_##name
#include "one_set.h"
#undef NAME
#undef SET

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_SETS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SET AVX2
#define NAME(name) avx2_##name
#include "one_set.h"
#undef NAME
#undef SET
#pragma GCC pop_options

#undef LANES
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#define SET AVX512
#define LANES 16
#define NAME(name) avx512_##name
#include "one_set.h"
#undef NAME
#undef SET
#pragma GCC pop_options
#endif

#undef LANES

/* The best set to use: 0 plain, 1 AVX2, 2 AVX-512. */
static int most = 2;

void opt_limit_set(int limit) { most = limit; }

static const struct set *best_set(void) {
#ifdef HAS_SETS
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return &avx512_set;
    if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_set;
#endif
    return &plain_set;
}

int opt_has_set(void) { return best_set() != &plain_set; }

struct job {
    struct product product;
    const struct set *set;
    int kind;
};

static void run_rows(void *argument, int index, int count) {
    const struct job *job = argument;
    size_t F = job->product.F, lines = (F + LINE - 1) / LINE;
    size_t first = lines * index / count * LINE, last = lines * (index + 1) / count * LINE;
    if (last > F) last = F;
    if (!job->product.blocks) {
        job->set->rows[job->kind](&job->product, first, last);
    } else {
        opt_int4_rows(&job->product, first, last);
        job->set->finish(&job->product, first, last);
    }
}

/* Each thread reads its own rows of a matrix that is (D, F), and has its own sums. */
static void run_columns(void *argument, int index, int count) {
    const struct job *job = argument;
    const struct product *p = &job->product;
    size_t width = (p->F + LINE - 1) / LINE * LINE;
    job->set->columns[job->kind](p, p->sums + index * p->M * width, p->D * index / count, p->D * (index + 1) / count);
}

/* As opt_product, for MAX_ROWS rows at most. */
static int product_of_rows(int kind, int threads, run_team *team, size_t M, size_t D, size_t F, const void *inputs,
                           int input_type, const void *matrix, const void *scales, const void *bias, int bias_type,
                           void *outputs, int output_type) {
    struct job job = {.set = best_set(), .kind = kind};
    struct product *p = &job.product;
    *p = (struct product){
        .M = M, .D = D, .F = F, .matrix = matrix, .scales = kind == INT4_ROWS ? NULL : scales,
        .groups = kind == INT4_ROWS ? scales : NULL, .bias = bias, .bias_type = bias_type, .outputs = outputs,
        .output_type = output_type,
    };
    size_t lanes = job.set->lanes;
    int dynamic = kind == INT8_DYNAMIC_ROWS, int4 = kind == INT4_ROWS, by_blocks = int4 && most >= 2 && opt_int4_works();
    size_t blocks = by_blocks ? M * ((D + 63) / 64) : 0;
    size_t own = by_blocks ? M * SUMS_APART(D) : int4 ? M * D + D / GROUP * lanes : 0;
    size_t widened = input_type == BFLOAT16 ? M * D : 0;
    int by_columns = job.set->columns[kind] != NULL;
    size_t width = (F + LINE - 1) / LINE * LINE;
    size_t summed = by_columns ? threads * M * width + (output_type == BFLOAT16 ? M * F : 0) : output_type == BFLOAT16 ? M * F : 0;
    /* Numbers of four bytes before those of one. */
    float *space = malloc(blocks * sizeof(struct int4_block) + (widened + summed + own + dynamic * (D + 2 * M)) * sizeof(float) +
                          dynamic * 2 * M * D + 1);
    if (!space) return -1;
    struct int4_block *int4_blocks = (struct int4_block *)space;
    float *wide = (float *)(int4_blocks + blocks), *sums = wide + widened;
    p->sums = summed ? sums : outputs;
    for (size_t i = 0; i < widened; i++) wide[i] = float_of(((const uint16_t *)inputs)[i]);
    p->floats = widened ? wide : inputs;
    if (dynamic) {
        float *rest = sums + summed, *steps = rest + D;
        uint8_t *integers = (uint8_t *)(steps + 2 * M);
        p->has_large = job.set->round_inputs(p, rest, integers, steps);
        p->integers = integers;
        p->steps = steps;
    }
    if (by_blocks) {
        opt_int4_inputs(p, int4_blocks, sums + summed);
        p->blocks = int4_blocks;
        p->group_sums = sums + summed;
    } else if (int4) {
        float *ordered = sums + summed, *group_sums = ordered + M * D;
        job.set->order_inputs(p, ordered, group_sums);
        p->floats = ordered;
        p->group_sums = group_sums;
    }
    if (!by_columns) {
        opt_run_parts(run_rows, &job, threads, team);
    } else {
        int count = opt_run_parts(run_columns, &job, threads, team);
        p->sums = output_type == BFLOAT16 ? sums + threads * M * width : outputs;
        for (size_t m = 0; m < M; m++)
            for (size_t f = 0; f < F; f += lanes)
                for (size_t lane = 0; lane < lanes && f + lane < F; lane++) {
                    const float *own = sums + f * M + m * lanes + lane;
                    float total = *own;
                    for (int other = 1; other < count; other++) total += own[other * M * width];
                    p->sums[m * F + f + lane] = total;
                }
        job.set->finish(p, 0, F);
    }
    free(space);
    return 0;
}

int opt_product(int kind, int threads, run_team *team, size_t M, size_t D, size_t F, const void *inputs, int input_type,
                const void *matrix, const void *scales, const void *bias, int bias_type, void *outputs,
                int output_type) {
    if (kind < 0 || kind >= KINDS || (kind == INT4_ROWS && D % GROUP != 0)) return -1;
    static const size_t bits[KINDS] = {
        [FLOAT32_ROWS] = 32, [BFLOAT16_ROWS] = 16, [INT8_ROWS] = 8, [INT8_DYNAMIC_ROWS] = 8, [INT4_ROWS] = 5,
        [FLOAT32_COLUMNS] = 32, [BFLOAT16_COLUMNS] = 16,
    };
    threads = opt_count_of_threads(threads, D * F * bits[kind] / 8);
    for (size_t m = 0; F > 0 && m < M; m += MAX_ROWS) {
        const char *from = (const char *)inputs + m * D * (input_type == BFLOAT16 ? 2 : 4);
        char *to = (char *)outputs + m * F * (output_type == BFLOAT16 ? 2 : 4);
        int result = product_of_rows(kind, threads, team, M - m < MAX_ROWS ? M - m : MAX_ROWS, D, F, from, input_type,
                                     matrix, scales, bias, bias_type, to, output_type);
        if (result != 0) return result;
    }
    return 0;
}

struct attention_job {
    struct attention attention;
    const struct set *set;
    int buffer_type;
    float *space;
    size_t space_each;
};

static struct share share_of(const struct attention_job *job, int index) {
    size_t heads = job->attention.batch * job->attention.heads;
    float *space = job->space + index * job->space_each;
    return (struct share){space, space + heads, space + 2 * heads};
}

/* The slots of all rows, one after the other, are divided: each thread reads one stretch of memory. */
static void run_slots(void *argument, int index, int count) {
    const struct attention_job *job = argument;
    const struct attention *a = &job->attention;
    struct share share = share_of(job, index);
    size_t first = a->batch * a->slots * index / count, last = a->batch * a->slots * (index + 1) / count;
    float *scores = share.contexts + a->batch * a->heads * a->head_dim;
    memset(share.totals, 0, a->batch * a->heads * sizeof(float));
    while (first < last) {
        size_t b = first / a->slots, slot = first % a->slots, count_here = last - first;
        if (count_here > a->slots - slot) count_here = a->slots - slot;
        job->set->attend_slots[job->buffer_type](a, b, slot, slot + count_here, scores, &share);
        first += count_here;
    }
}

/* Numbers of either type, rows `apart` from each other, as numbers of either type, rows `to_apart` from each other. */
static void copy_rows(void *to, int to_type, size_t to_apart, const void *from, int type, size_t apart, size_t rows,
                      size_t width) {
    for (size_t b = 0; b < rows; b++)
        for (size_t i = 0; i < width; i++) {
            size_t at = b * apart + i;
            float value = type == BFLOAT16 ? float_of(((const uint16_t *)from)[at]) : ((const float *)from)[at];
            if (to_type == BFLOAT16)
                ((uint16_t *)to)[b * to_apart + i] = bfloat16_of(value);
            else
                ((float *)to)[b * to_apart + i] = value;
        }
}

int opt_attention(int threads, run_team *team, size_t batch, size_t heads, size_t head_dim, size_t capacity, size_t slot,
                  const void *queries, size_t row, const void *new_keys, const void *new_values, size_t new_row,
                  int type, const void *bias, size_t bias_row, void *keys, void *values, int buffer_type, void *outputs) {
    size_t D = heads * head_dim, slots = slot + 1;
    threads = opt_count_of_threads(threads, batch * slots * D * (buffer_type == BFLOAT16 ? 2 : 4));
    size_t space_each = batch * heads * (2 + head_dim) + heads * slots;
    struct attention_job job = {.set = best_set(), .buffer_type = buffer_type, .space_each = space_each};
    float *space = malloc((batch * D + threads * job.space_each) * sizeof(float));
    if (!space) return -1;
    job.space = space + batch * D;
    job.attention = (struct attention){
        .batch = batch, .heads = heads, .head_dim = head_dim, .capacity = capacity, .slots = slots, .queries = space,
        .keys = keys, .values = values, .bias = bias, .bias_row = bias_row, .type = type, .outputs = outputs,
    };
    size_t place = slot * D * (buffer_type == BFLOAT16 ? 2 : 4);
    copy_rows(space, FLOAT32, D, queries, type, row, batch, D);
    copy_rows((char *)keys + place, buffer_type, capacity * D, new_keys, type, new_row, batch, D);
    copy_rows((char *)values + place, buffer_type, capacity * D, new_values, type, new_row, batch, D);
    int count = opt_run_parts(run_slots, &job, threads, team);
    struct share shares[MAX_THREADS];
    for (int i = 0; i < count; i++) shares[i] = share_of(&job, i);
    job.set->merge_shares(&job.attention, shares, count);
    free(space);
    return 0;
}

struct prompt_job {
    struct prompt prompt;
    const struct set *set;
    float *space;
    size_t space_each;
};

/* The keys or values of a head, one after the other. */
static void gather_head(const struct prompt *p, const void *from, size_t apart, size_t b, size_t n, float *to) {
    size_t H = p->head_dim;
    for (size_t t = 0; t < p->tokens; t++)
        copy_rows(to + t * H, FLOAT32, H, (const char *)from + ((b * p->tokens + t) * apart + n * H) * (p->type == BFLOAT16 ? 2 : 4),
                  p->type, H, 1, H);
}

/* The heads of all rows are divided, and where one is shared, its queries. */
static void run_queries(void *argument, int index, int count) {
    const struct prompt_job *job = argument;
    const struct prompt *p = &job->prompt;
    size_t together = job->set->together, blocks = (p->tokens + together - 1) / together, heads = p->batch * p->heads;
    float *keys = job->space + index * job->space_each, *values = keys + p->tokens * p->head_dim;
    float *space = values + p->tokens * p->head_dim;
    size_t head = (size_t)-1;
    for (size_t i = heads * blocks * index / count; i < heads * blocks * (index + 1) / count; i++) {
        size_t b = i / blocks / p->heads, n = i / blocks % p->heads;
        if (i / blocks != head) {
            head = i / blocks;
            gather_head(p, p->keys, p->key_apart, b, n, keys);
            gather_head(p, p->values, p->value_apart, b, n, values);
        }
        job->set->attend_queries(p, b, n, i % blocks * together, keys, values, space);
    }
}

int opt_prompt_attention(int threads, run_team *team, size_t batch, size_t tokens, size_t heads, size_t head_dim,
                         const void *queries, size_t query_apart, const void *keys, size_t key_apart,
                         const void *values, size_t value_apart, int type, void *outputs) {
    threads = opt_count_of_threads(threads, batch * heads * tokens * tokens * sizeof(float));
    struct prompt_job job = {.set = best_set()};
    job.prompt = (struct prompt){batch, tokens, heads, head_dim, queries, keys, values, query_apart, key_apart, value_apart, type, outputs};
    size_t together = job.set->together, slots = (tokens + together - 1) / together * together;
    job.space_each = 2 * tokens * head_dim + 2 * head_dim * together + slots * together;
    job.space = malloc(threads * job.space_each * sizeof(float));
    if (!job.space) return -1;
    opt_run_parts(run_queries, &job, threads, team);
    free(job.space);
    return 0;
}

/* VERSION of opt_common/native/__init__.py: what has to be another number when arguments change. */
int opt_version(void) { return 5; }
