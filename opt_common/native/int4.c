/* Products with 4-bit integers, two to a byte, for processors that multiply bfloat16.

   Sixty-four integers are read at a time. A table turns them into bfloat16, which has them exactly, and one instruction
   multiplies 32 of those by inputs and adds them up in pairs (AVX512-BF16). Inputs are rounded to bfloat16. */

#include "product.h"
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")

#define BLOCK 64
#define STRETCH 512
#define UNROLLED _Pragma("GCC unroll 16")

int opt_int4_works(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

static inline __m512 dot(__m512 sums, __m512i weights, const uint16_t *inputs) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(inputs));
}

void opt_int4_inputs(const struct product *p, struct int4_block *blocks, float *group_sums) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    const __m512i even_places = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd_places = _mm512_add_epi32(even_places, _mm512_set1_epi32(1));
    memset(group_sums, 0, p->M * SUMS_APART(p->D) * sizeof(float));
    for (size_t m = 0; m < p->M; m++)
        for (size_t k = 0; k < p->D; k += BLOCK, blocks++) {
            const float *from = p->floats + m * p->D + k;
            float *sums = group_sums + m * SUMS_APART(p->D) + k / GROUP;
            memset(blocks, 0, sizeof *blocks);
            for (size_t i = 0; i < BLOCK / GROUP && k + GROUP * i < p->D; i++) {
                __m512 first = _mm512_loadu_ps(from + GROUP * i), second = _mm512_loadu_ps(from + GROUP * i + 16);
                __m512 even = _mm512_permutex2var_ps(first, even_places, second);
                __m512 odd = _mm512_permutex2var_ps(first, odd_places, second);
                _mm256_storeu_si256((__m256i *)blocks->even + i, (__m256i)_mm512_cvtneps_pbh(even));
                _mm256_storeu_si256((__m256i *)blocks->odd + i, (__m256i)_mm512_cvtneps_pbh(odd));
            }
            __m512 sixteen = dot(dot(_mm512_setzero_ps(), ones, blocks->even), ones, blocks->odd);
            sums[0] = _mm512_mask_reduce_add_ps(0x00ff, sixteen);
            sums[1] = _mm512_mask_reduce_add_ps(0xff00, sixteen);
        }
}

/* What the integers 0 to 15 stand for, -8 to 7, in bfloat16, twice: of an index, five bits count. */
static inline __m512i table(void) {
    static const uint16_t numbers[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                         0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                         0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                         0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    return _mm512_loadu_si512(numbers);
}

/* Which of sixteen groups' scales each of a block's sums is multiplied by. */
static inline __m512i places(int block) {
    __m512i first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_add_epi32(first, _mm512_set1_epi32(2 * block));
}

/* Fetch what is read some rows later: a processor by itself does so within a page only. It does no harm behind the end. */
#define AHEAD 2048
#define FETCH(from) __builtin_prefetch(from, 0, 2)

#define ADD_BLOCK(M, R, load_codes)                                                                                    \
    {                                                                                                                  \
        __m512i index = places((int)(k % STRETCH / BLOCK));                                                            \
        UNROLLED                                                                                                       \
        for (int r = 0; r < R; r++) {                                                                                  \
            FETCH(codes + r * apart * row_bytes + k / 2 + AHEAD);                                                      \
            __m512i bytes = _mm512_cvtepu8_epi16(load_codes(codes + r * apart * row_bytes + k / 2));                   \
            __m512i even = _mm512_permutexvar_epi16(bytes, numbers);                                                   \
            __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), numbers);                              \
            __m512 own_scales = _mm512_permutexvar_ps(index, scales[r]);                                               \
            UNROLLED                                                                                                   \
            for (int m = 0; m < M; m++) {                                                                              \
                const struct int4_block *block = blocks + m * row_blocks + k / BLOCK;                                  \
                __m512 sums = dot(dot(_mm512_setzero_ps(), even, block->even), odd, block->odd);                       \
                totals[m * R + r] = _mm512_fmadd_ps(own_scales, sums, totals[m * R + r]);                              \
            }                                                                                                          \
        }                                                                                                              \
    }

static inline __m256i all_codes(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline __m256i half_of_codes(const uint8_t *from) {
    return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)from));
}

/* Rows m of inputs with R rows of the matrix, `apart` rows apart from `row` on. Scales and offsets are read for a stretch
   of sixteen groups at a time. */
#define DOTS(M, R)                                                                                                     \
    static __attribute__((noinline)) void dots_##M##_##R(const struct product *p, size_t m0, size_t row,               \
                                                         size_t apart) {                                               \
        const __m512i numbers = table();                                                                               \
        size_t D = p->D, row_bytes = D / 2, row_groups = D / GROUP, row_blocks = (D + BLOCK - 1) / BLOCK;              \
        const uint8_t *codes = (const uint8_t *)p->matrix + row * row_bytes;                                           \
        const uint16_t *groups = p->groups + row * row_groups * 2;                                                     \
        const struct int4_block *blocks = p->blocks + m0 * row_blocks;                                                 \
        const float *group_sums = p->group_sums + m0 * SUMS_APART(D);                                                  \
        __m512 totals[M * R], scales[R];                                                                               \
        UNROLLED                                                                                                       \
        for (int i = 0; i < M * R; i++) totals[i] = _mm512_setzero_ps();                                               \
        for (size_t start = 0; start < D; start += STRETCH) {                                                          \
            size_t end = start + STRETCH < D ? start + STRETCH : D, k = start;                                         \
            __mmask16 inside = (__mmask16)((1u << (end - start) / GROUP) - 1);                                         \
            UNROLLED                                                                                                   \
            for (int r = 0; r < R; r++) {                                                                              \
                const uint16_t *from = groups + (r * apart * row_groups + start / GROUP) * 2;                          \
                __m512i both = _mm512_maskz_loadu_epi32(inside, from);                                                 \
                __m512 offsets = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));                   \
                FETCH(from + AHEAD / 8);                                                                               \
                scales[r] = (__m512)_mm512_slli_epi32(both, 16);                                                       \
                UNROLLED                                                                                               \
                for (int m = 0; m < M; m++) {                                                                          \
                    __m512 sums = _mm512_loadu_ps(group_sums + m * SUMS_APART(D) + start / GROUP);                     \
                    totals[m * R + r] = _mm512_fmadd_ps(offsets, sums, totals[m * R + r]);                             \
                }                                                                                                      \
            }                                                                                                          \
            for (; k + BLOCK <= end; k += BLOCK) ADD_BLOCK(M, R, all_codes)                                            \
            if (k < end) ADD_BLOCK(M, R, half_of_codes)                                                                \
        }                                                                                                              \
        UNROLLED                                                                                                       \
        for (int m = 0; m < M; m++) {                                                                                  \
            UNROLLED                                                                                                   \
            for (int r = 0; r < R; r++)                                                                                \
                p->sums[(m0 + m) * p->F + row + r * apart] = _mm512_reduce_add_ps(totals[m * R + r]);                  \
        }                                                                                                              \
    }

DOTS(1, 1)
DOTS(1, 4)
DOTS(4, 1)
DOTS(4, 4)

void opt_int4_rows(const struct product *p, size_t first, size_t last) {
    /* Processors fetch in advance from several places at a time: four quarters. */
    size_t quarter = (last - first) / 4;
    for (size_t f = first; f < first + quarter; f++) {
        size_t m = 0;
        for (; m + 4 <= p->M; m += 4) dots_4_4(p, m, f, quarter);
        for (; m < p->M; m++) dots_1_4(p, m, f, quarter);
    }
    for (size_t f = first + 4 * quarter; f < last; f++) {
        size_t m = 0;
        for (; m + 4 <= p->M; m += 4) dots_4_1(p, m, f, 0);
        for (; m < p->M; m++) dots_1_1(p, m, f, 0);
    }
}

#else

int opt_int4_works(void) { return 0; }
void opt_int4_inputs(const struct product *p, struct int4_block *blocks, float *group_sums) {
    (void)p, (void)blocks, (void)group_sums;
}
void opt_int4_rows(const struct product *p, size_t first, size_t last) { (void)p, (void)first, (void)last; }

#endif
