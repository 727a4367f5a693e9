/* Products of a few rows of inputs with a matrix, for one instruction set.

   products.c includes this file once for each SET, with LANES numbers in its vectors and NAME() telling the functions of
   one from those of another. AVX512 has an instruction for sums of four 8-bit products (VNNI).

   Inputs are float32, (M, D). A matrix is read once, from memory, whatever M is: that is all the time there is to save.
*/

/* A vector of numbers. The compiler makes of it as many instructions as the set needs. */
typedef float NAME(vector) __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t NAME(bits) __attribute__((vector_size(LANES * sizeof(float))));
#define vector NAME(vector)

/* Rows of inputs that are multiplied at a time: with those of the matrix they fill the registers, and don't overflow them. */
#if SET == AVX512
#define ROWS 4
#define IF_ROWS_4(...) __VA_ARGS__
#else
#define ROWS 2
#define IF_ROWS_4(...)
#endif

static inline vector NAME(load_float32)(const float *from) {
    vector values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline vector NAME(load_bfloat16)(const uint16_t *from) {
#if SET == AVX512
    __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
    return (vector)_mm512_castsi512_ps(bits);
#else
    uint32_t bits[LANES];
    vector values;
    for (int i = 0; i < LANES; i++) bits[i] = (uint32_t)from[i] << 16;
    memcpy(&values, bits, sizeof values);
    return values;
#endif
}

static inline vector NAME(load_int8)(const int8_t *from) {
#if SET == AVX512
    return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif SET == AVX2
    return (vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    float copy[LANES];
    vector values;
    for (int i = 0; i < LANES; i++) copy[i] = from[i];
    memcpy(&values, copy, sizeof values);
    return values;
#endif
}

/* The 4-bit integers in the lower halves of bytes, or the upper. */
static inline vector NAME(load_int4)(const uint8_t *from, int upper) {
#if SET == AVX512
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    codes = upper ? _mm512_srli_epi32(codes, 4) : _mm512_and_si512(codes, _mm512_set1_epi32(15));
    return (vector)_mm512_cvtepi32_ps(codes);
#elif SET == AVX2
    __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
    codes = upper ? _mm256_srli_epi32(codes, 4) : _mm256_and_si256(codes, _mm256_set1_epi32(15));
    return (vector)_mm256_cvtepi32_ps(codes);
#else
    float copy[LANES];
    vector values;
    for (int i = 0; i < LANES; i++) copy[i] = (float)(upper ? from[i] >> 4 : from[i] & 15);
    memcpy(&values, copy, sizeof values);
    return values;
#endif
}

static inline float NAME(sum)(vector values) {
#if SET == AVX512
    return _mm512_reduce_add_ps((__m512)values);
#else
    float parts[LANES];
    memcpy(parts, &values, sizeof values);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
#endif
}

#if SET == AVX512
/* The sum of each of sixteen vectors: two become one that holds half as many parts of each, four times. */
#define SUMS_OF_SIXTEEN(suffix, type, add)                                                                             \
    static inline type NAME(sums_of_sixteen_##suffix)(const type *all) {                                               \
        type eight[8], four[4], two[2];                                                                                \
        for (int i = 0; i < 8; i++) {                                                                                  \
            __m512i first = (__m512i)all[2 * i], second = (__m512i)all[2 * i + 1];                                     \
            eight[i] = add((type)_mm512_unpacklo_epi32(first, second), (type)_mm512_unpackhi_epi32(first, second));    \
        }                                                                                                              \
        for (int i = 0; i < 4; i++) {                                                                                  \
            __m512i first = (__m512i)eight[2 * i], second = (__m512i)eight[2 * i + 1];                                 \
            four[i] = add((type)_mm512_unpacklo_epi64(first, second), (type)_mm512_unpackhi_epi64(first, second));     \
        }                                                                                                              \
        for (int i = 0; i < 2; i++) {                                                                                  \
            __m512i first = (__m512i)four[2 * i], second = (__m512i)four[2 * i + 1];                                   \
            two[i] = add((type)_mm512_shuffle_i32x4(first, second, 0x88),                                              \
                         (type)_mm512_shuffle_i32x4(first, second, 0xdd));                                             \
        }                                                                                                              \
        __m512i first = (__m512i)two[0], second = (__m512i)two[1];                                                     \
        return add((type)_mm512_shuffle_i32x4(first, second, 0x88), (type)_mm512_shuffle_i32x4(first, second, 0xdd));  \
    }
SUMS_OF_SIXTEEN(float32, __m512, _mm512_add_ps)
SUMS_OF_SIXTEEN(int32, __m512i, _mm512_add_epi32)
#undef SUMS_OF_SIXTEEN
#endif

/* The sum of each of `count` vectors. */
static inline void NAME(sum_each)(const vector *totals, int count, float *sums) {
#if SET == AVX512
    if (count == LANES) {
        _mm512_storeu_ps(sums, NAME(sums_of_sixteen_float32)((const __m512 *)totals));
        return;
    }
#endif
    for (int i = 0; i < count; i++) sums[i] = NAME(sum)(totals[i]);
}

/* From what is read of a row to what is fetched for later: the next row, or further where rows are short. */
#define AHEAD(D, size) ((D) * (size) < 2048 ? 2048 / (size) : (D))

/* Sums of products of M rows of inputs, D apart, with R rows of a matrix, `apart` apart, to sums[m * R + r]. */
#define DOTS(suffix, type, M, R)                                                                                       \
    static ALONE void NAME(dots_##suffix##_##M##_##R)(const float *inputs, const type *rows, size_t apart, size_t D,   \
                                                      float *sums) {                                                   \
        vector totals[M * R];                                                                                          \
        UNROLLED                                                                                                       \
        for (int i = 0; i < M * R; i++) totals[i] = (vector){0};                                                       \
        size_t k = 0;                                                                                                  \
        for (; k + LINE <= D; k += LINE) {                                                                             \
            UNROLLED                                                                                                   \
            for (int r = 0; r < R; r++) FETCH(rows + r * apart + k + AHEAD(D, sizeof *rows));                          \
            UNROLLED                                                                                                   \
            for (size_t i = k; i < k + LINE; i += LANES) {                                                             \
                vector weights[R];                                                                                     \
                UNROLLED                                                                                               \
                for (int r = 0; r < R; r++) weights[r] = NAME(load_##suffix)(rows + r * apart + i);                    \
                UNROLLED                                                                                               \
                for (int m = 0; m < M; m++) {                                                                          \
                    vector values = NAME(load_float32)(inputs + m * D + i);                                            \
                    UNROLLED                                                                                           \
                    for (int r = 0; r < R; r++) totals[m * R + r] += values * weights[r];                              \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        NAME(sum_each)(totals, M * R, sums);                                                                           \
        for (; k < D; k++)                                                                                             \
            UNROLLED                                                                                                   \
            for (int m = 0; m < M; m++)                                                                                \
                for (int r = 0; r < R; r++) sums[m * R + r] += inputs[m * D + k] * ONE_##suffix(rows[r * apart + k]);  \
    }

/* The same of all rows of inputs with R rows of a matrix, the first of them `row`, `apart` rows apart. */
#define DOTS_OF_ALL(suffix, type, R)                                                                                   \
    DOTS(suffix, type, 1, R)                                                                                           \
    DOTS(suffix, type, 2, R)                                                                                           \
    IF_ROWS_4(DOTS(suffix, type, 4, R))                                                                                \
    static inline void NAME(dots_##suffix##_##R)(const struct product *p, size_t row, size_t apart) {                  \
        const type *rows = (const type *)p->matrix + row * p->D;                                                       \
        size_t D = p->D, m = 0;                                                                                        \
        float sums[ROWS * R];                                                                                          \
        while (m < p->M) {                                                                                             \
            size_t count = p->M - m >= ROWS ? ROWS : p->M - m >= 2 ? 2 : 1;                                            \
            const float *inputs = p->floats + m * D;                                                                   \
            IF_ROWS_4(if (count == 4) NAME(dots_##suffix##_4_##R)(inputs, rows, apart * D, D, sums);)                  \
            if (count == 2) NAME(dots_##suffix##_2_##R)(inputs, rows, apart * D, D, sums);                             \
            if (count == 1) NAME(dots_##suffix##_1_##R)(inputs, rows, apart * D, D, sums);                             \
            for (size_t i = 0; i < count; i++, m++)                                                                    \
                for (size_t r = 0; r < R; r++) p->sums[m * p->F + row + r * apart] = sums[i * R + r];                  \
        }                                                                                                              \
    }

#define ONE_float32(value) (value)
#define ONE_bfloat16(value) float_of(value)
#define ONE_int8(value) ((float)(value))

DOTS_OF_ALL(float32, float, 4)
DOTS_OF_ALL(float32, float, 1)
DOTS_OF_ALL(bfloat16, uint16_t, 4)
DOTS_OF_ALL(bfloat16, uint16_t, 1)
DOTS_OF_ALL(int8, int8_t, 4)
DOTS_OF_ALL(int8, int8_t, 1)

/* Sums of products of integers from -127 to 127, X rows with R, like `DOTS`. The inputs have 128 added to them. */
#if SET == AVX512
static inline __m512i NAME(load_inside)(__mmask64 inside, const void *from) {
    return _mm512_maskz_loadu_epi8(inside, from);
}
/* Sums of four products each are added to `sums`. The compiler's own function for it copies them each time. */
#define ADD_DOTS(sums, values, weights) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(weights))
#define INTEGER_DOTS(X, R)                                                                                             \
    static ALONE void NAME(integer_dots_##X##_##R)(const uint8_t *inputs, const int8_t *rows, size_t apart, size_t D,  \
                                                   int32_t *sums) {                                                    \
        const __m512i all_128 = _mm512_set1_epi8((char)128);                                                           \
        __m512i totals[X * R], surplus[R], all[X * R];                                                                 \
        UNROLLED                                                                                                       \
        for (int i = 0; i < X * R; i++) totals[i] = _mm512_setzero_si512();                                            \
        UNROLLED                                                                                                       \
        for (int r = 0; r < R; r++) surplus[r] = _mm512_setzero_si512();                                               \
        size_t k = 0;                                                                                                  \
        for (; k + 64 <= D; k += 64) {                                                                                 \
            __m512i weights[R];                                                                                        \
            UNROLLED                                                                                                   \
            for (int r = 0; r < R; r++) {                                                                              \
                weights[r] = _mm512_loadu_si512(rows + r * apart + k);                                                 \
                FETCH(rows + r * apart + k + AHEAD(D, sizeof *rows));                                                  \
                ADD_DOTS(surplus[r], all_128, weights[r]);                                                             \
            }                                                                                                          \
            UNROLLED                                                                                                   \
            for (int x = 0; x < X; x++) {                                                                              \
                __m512i values = _mm512_loadu_si512(inputs + x * D + k);                                               \
                UNROLLED                                                                                               \
                for (int r = 0; r < R; r++) ADD_DOTS(totals[x * R + r], values, weights[r]);                           \
            }                                                                                                          \
        }                                                                                                              \
        UNROLLED                                                                                                       \
        for (int i = 0; i < X * R; i++) all[i] = _mm512_sub_epi32(totals[i], surplus[i % R]);                          \
        if (X * R == 16)                                                                                               \
            _mm512_storeu_si512(sums, NAME(sums_of_sixteen_int32)(all));                                               \
        else                                                                                                           \
            UNROLLED                                                                                                   \
            for (int i = 0; i < X * R; i++) sums[i] = _mm512_reduce_add_epi32(all[i]);                                 \
        if (k == D) return;                                                                                            \
        __mmask64 inside = (1ull << (D - k)) - 1;                                                                      \
        for (int i = 0; i < X * R; i++) {                                                                              \
            __m512i weights = NAME(load_inside)(inside, rows + i % R * apart + k);                                     \
            __m512i values = NAME(load_inside)(inside, inputs + i / R * D + k);                                        \
            __m512i rest = _mm512_dpbusd_epi32(_mm512_setzero_si512(), all_128, weights);                              \
            rest = _mm512_sub_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), values, weights), rest);               \
            sums[i] += _mm512_reduce_add_epi32(rest);                                                                  \
        }                                                                                                              \
    }
#elif SET == AVX2
static inline int32_t NAME(sum_int32)(__m256i values) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
/* Sixteen at a time, as 16-bit integers, whose products are added up in pairs. */
#define INTEGER_DOTS(X, R)                                                                                             \
    static ALONE void NAME(integer_dots_##X##_##R)(const uint8_t *inputs, const int8_t *rows, size_t apart, size_t D,  \
                                                   int32_t *sums) {                                                    \
        const __m256i all_128 = _mm256_set1_epi16(128);                                                                \
        __m256i totals[X * R];                                                                                         \
        UNROLLED                                                                                                       \
        for (int i = 0; i < X * R; i++) totals[i] = _mm256_setzero_si256();                                            \
        size_t k = 0;                                                                                                  \
        for (; k + 16 <= D; k += 16) {                                                                                 \
            __m256i weights[R];                                                                                        \
            UNROLLED                                                                                                   \
            for (int r = 0; r < R; r++) {                                                                              \
                weights[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(rows + r * apart + k)));           \
                FETCH(rows + r * apart + k + D);                                                                       \
            }                                                                                                          \
            UNROLLED                                                                                                   \
            for (int x = 0; x < X; x++) {                                                                              \
                __m256i values = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(inputs + x * D + k)));         \
                values = _mm256_sub_epi16(values, all_128);                                                            \
                UNROLLED                                                                                               \
                for (int r = 0; r < R; r++)                                                                            \
                    totals[x * R + r] = _mm256_add_epi32(totals[x * R + r], _mm256_madd_epi16(values, weights[r]));    \
            }                                                                                                          \
        }                                                                                                              \
        for (int i = 0; i < X * R; i++) {                                                                              \
            sums[i] = NAME(sum_int32)(totals[i]);                                                                      \
            for (size_t rest = k; rest < D; rest++)                                                                    \
                sums[i] += (inputs[i / R * D + rest] - 128) * rows[i % R * apart + rest];                              \
        }                                                                                                              \
    }
#else
#define INTEGER_DOTS(X, R)                                                                                             \
    static ALONE void NAME(integer_dots_##X##_##R)(const uint8_t *inputs, const int8_t *rows, size_t apart, size_t D,  \
                                                   int32_t *sums) {                                                    \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int x = 0; x < X; x++) {                                                                              \
                int32_t total = 0, surplus = 0;                                                                        \
                for (size_t k = 0; k < D; k++) {                                                                       \
                    total += inputs[x * D + k] * rows[r * apart + k];                                                  \
                    surplus += rows[r * apart + k];                                                                    \
                }                                                                                                      \
                sums[x * R + r] = total - 128 * surplus;                                                               \
            }                                                                                                          \
    }
#endif

#define INTEGER_DOTS_OF_ALL(R)                                                                                         \
    INTEGER_DOTS(1, R)                                                                                                 \
    INTEGER_DOTS(2, R)                                                                                                 \
    IF_ROWS_4(INTEGER_DOTS(4, R))                                                                                      \
    static inline void NAME(dots_int8_dynamic_##R)(const struct product *p, size_t row, size_t apart) {                \
        const int8_t *rows = (const int8_t *)p->matrix + row * p->D;                                                   \
        size_t D = p->D, X = p->has_large ? 2 * p->M : p->M, x = 0;                                                    \
        int32_t sums[2 * MAX_ROWS * R];                                                                                \
        IF_ROWS_4(for (; x + 4 <= X; x += 4)                                                                           \
                      NAME(integer_dots_4_##R)(p->integers + x * D, rows, apart * D, D, sums + x * R);)                \
        for (; x + 2 <= X; x += 2)                                                                                     \
            NAME(integer_dots_2_##R)(p->integers + x * D, rows, apart * D, D, sums + x * R);                           \
        if (x < X) NAME(integer_dots_1_##R)(p->integers + x * D, rows, apart * D, D, sums + x * R);                    \
        for (size_t m = 0; m < p->M; m++)                                                                              \
            for (size_t r = 0; r < R; r++) {                                                                           \
                float total = (float)sums[m * R + r] * p->steps[m];                                                    \
                if (p->has_large) total += (float)sums[(p->M + m) * R + r] * p->steps[p->M + m];                       \
                p->sums[m * p->F + row + r * apart] = total;                                                           \
            }                                                                                                          \
    }

INTEGER_DOTS_OF_ALL(4)
INTEGER_DOTS_OF_ALL(1)

/* Inputs as 8-bit integers with 128 added, one step for a row; large ones apart, with their own step, and what their
   rounding leaves with the rest: the rule of "int8-dynamic" in opt_common/quantization.py, in the same order. */
static void NAME(round_row)(const float *values, size_t D, float peak, uint8_t *integers, float *step) {
    /* The smallest normal number keeps rows of zeros from being divided by zero. */
    float unit = peak / 127 > FLT_MIN ? peak / 127 : FLT_MIN;
    /* Adding this number and taking it away again rounds to the nearest integer, ties to even. */
    const float rounder = 12582912;
    for (size_t k = 0; k < D; k++) integers[k] = (uint8_t)((int32_t)((values[k] / unit + rounder) - rounder) + 128);
    *step = unit;
}

/* The largest size of D numbers; infinite or none at all, if one of them is. */
static float NAME(peak)(const float *values, size_t D) {
    /* Sizes are in the order of their bits, which a compiler may compare in any order. */
    int32_t largest = 0;
    for (size_t k = 0; k < D; k++) {
        int32_t bits;
        memcpy(&bits, values + k, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float peak;
    memcpy(&peak, &largest, sizeof peak);
    return peak;
}

static int NAME(round_inputs)(const struct product *p, float *rest, uint8_t *integers, float *steps) {
    size_t D = p->D, M = p->M;
    int has_large = 0;
    for (size_t m = 0; m < M; m++) has_large |= (steps[m] = NAME(peak)(p->floats + m * D, D)) > OUTLIER;
    for (size_t m = 0; m < M; m++) {
        const float *values = p->floats + m * D;
        float peak = steps[m], large_step = 0;
        uint8_t *large = integers + (M + m) * D;
        if (!(peak <= FLT_MAX)) {
            /* No step, and so no product. */
            steps[m] = steps[M + m] = NAN;
            continue;
        }
        if (has_large) {
            for (size_t k = 0; k < D; k++) rest[k] = fabsf(values[k]) > OUTLIER ? values[k] : 0;
            NAME(round_row)(rest, D, NAME(peak)(rest, D), large, &large_step);
            for (size_t k = 0; k < D; k++) rest[k] = values[k] - (float)((int32_t)large[k] - 128) * large_step;
            values = rest;
            peak = NAME(peak)(rest, D);
        }
        NAME(round_row)(values, D, peak, integers + m * D, steps + m);
        steps[M + m] = large_step;
    }
    return has_large;
}

/* What comes after the sums of columns `first` to `last` of the outputs: scales, bias, type. */
static void NAME(finish)(const struct product *p, size_t first, size_t last) {
    for (size_t m = 0; m < p->M; m++) {
        float *sums = p->sums + m * p->F;
        if (p->scales)
            for (size_t f = first; f < last; f++) sums[f] *= p->scales[f];
        if (p->bias && p->bias_type == BFLOAT16)
            for (size_t f = first; f < last; f++) sums[f] += float_of(((const uint16_t *)p->bias)[f]);
        else if (p->bias)
            for (size_t f = first; f < last; f++) sums[f] += ((const float *)p->bias)[f];
        if (p->output_type == BFLOAT16)
            for (size_t f = first; f < last; f++) ((uint16_t *)p->outputs)[m * p->F + f] = bfloat16_of(sums[f]);
    }
}

/* Rows of the matrix from `first` to `last`. Processors fetch in advance from several places at a time: four quarters. */
#define ALL_ROWS(suffix)                                                                                               \
    static void NAME(suffix##_rows)(const struct product *p, size_t first, size_t last) {                              \
        size_t quarter = (last - first) / 4;                                                                           \
        for (size_t f = first; f < first + quarter; f++) NAME(dots_##suffix##_4)(p, f, quarter);                       \
        for (size_t f = first + 4 * quarter; f < last; f++) NAME(dots_##suffix##_1)(p, f, 0);                          \
        NAME(finish)(p, first, last);                                                                                  \
    }

ALL_ROWS(float32)
ALL_ROWS(bfloat16)
ALL_ROWS(int8)
ALL_ROWS(int8_dynamic)

/* Inputs rounded to bfloat16, (M, D), in stretches: of each stretch all rows, and of each group the numbers at even places
   before those at odd ones, as the integers are in two halves of a byte. Of one row also the sum of each group's vectors,
   (D / GROUP, LANES). */
static void NAME(order_inputs)(const struct product *p, float *ordered, float *group_sums) {
    const float *single = p->M == 1 ? ordered : NULL;
    for (size_t start = 0; start < p->D; start += STRETCH)
        for (size_t m = 0; m < p->M; m++) {
            const float *values = p->floats + m * p->D;
            size_t end = start + STRETCH < p->D ? start + STRETCH : p->D;
            for (size_t k = start; k < end; k += GROUP, ordered += GROUP)
                for (size_t i = 0; i < GROUP / 2; i++) {
                    ordered[i] = float_of(bfloat16_of(values[k + 2 * i]));
                    ordered[GROUP / 2 + i] = float_of(bfloat16_of(values[k + 2 * i + 1]));
                }
        }
    for (size_t k = 0; single && k < p->D; k += GROUP, group_sums += LANES) {
        vector sums = {0};
        for (int i = 0; i < GROUP; i += LANES) sums += NAME(load_float32)(single + k + i);
        memcpy(group_sums, &sums, sizeof sums);
    }
}

/* A row of inputs with R rows of 4-bit integers, which are multiplied as they are: their scale is that of a sum. */
#define SINGLE_INT4_DOTS(R)                                                                                            \
    static ALONE void NAME(single_dots_int4_##R)(const struct product *p, size_t row, size_t apart) {                  \
        size_t D = p->D;                                                                                               \
        const uint8_t *codes = (const uint8_t *)p->matrix + row * D / 2;                                               \
        const uint16_t *groups = p->groups + row * D / GROUP * 2;                                                      \
        vector totals[R];                                                                                              \
        UNROLLED                                                                                                       \
        for (int r = 0; r < R; r++) totals[r] = (vector){0};                                                           \
        for (size_t k = 0; k < D; k += GROUP) {                                                                        \
            const float *inputs = p->floats + k;                                                                       \
            vector sums = NAME(load_float32)(p->group_sums + k / GROUP * LANES);                                       \
            UNROLLED                                                                                                   \
            for (int r = 0; r < R; r++) {                                                                              \
                const uint8_t *own_codes = codes + (r * apart * D + k) / 2;                                            \
                const uint16_t *group = groups + (r * apart * D + k) / GROUP * 2;                                      \
                NAME(bits) both = (NAME(bits)){0} + (int32_t)(group[0] | (uint32_t)group[1] << 16);                    \
                vector scale = (vector)(both << 16), offset = (vector)(both & (int32_t)0xffff0000);                    \
                vector own = sums * -8;                                                                                \
                UNROLLED                                                                                               \
                for (int upper = 0; upper < 2; upper++)                                                                \
                    UNROLLED                                                                                           \
                    for (int i = 0; i < GROUP / 2; i += LANES)                                                         \
                        own += NAME(load_int4)(own_codes + i, upper) *                                                 \
                               NAME(load_float32)(inputs + GROUP / 2 * upper + i);                                     \
                totals[r] += offset * sums;                                                                            \
                totals[r] += scale * own;                                                                              \
                FETCH(own_codes + 512);                                                                                \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < R; r++) p->sums[row + r * apart] = NAME(sum)(totals[r]);                                   \
    }

SINGLE_INT4_DOTS(4)
SINGLE_INT4_DOTS(1)

/* What 4-bit integers stand for, in the same order. */
static inline void NAME(expand)(const uint8_t *codes, const uint16_t *groups, size_t count, float *numbers) {
    for (size_t k = 0; k < count; k += GROUP, codes += GROUP / 2, groups += 2, numbers += GROUP) {
        FETCH(codes + 512);
        float scale = float_of(groups[0]), offset = float_of(groups[1]) - 8 * scale;
        UNROLLED
        for (int upper = 0; upper < 2; upper++)
            UNROLLED
            for (int i = 0; i < GROUP / 2; i += LANES) {
                vector values = NAME(load_int4)(codes + i, upper) * scale + offset;
                memcpy(numbers + GROUP / 2 * upper + i, &values, sizeof values);
            }
    }
}

/* For several rows of inputs, rows of 4-bit integers become numbers, a stretch at a time, and those are multiplied. */
#define INT4_DOTS(R)                                                                                                   \
    static void NAME(dots_int4_##R)(const struct product *p, size_t row, size_t apart) {                               \
        if (p->M == 1) {                                                                                               \
            NAME(single_dots_int4_##R)(p, row, apart);                                                                 \
            return;                                                                                                    \
        }                                                                                                              \
        float numbers[R * STRETCH], sums[MAX_ROWS * R];                                                                \
        struct product part = {.M = p->M, .F = R, .matrix = numbers, .sums = sums};                                    \
        for (size_t m = 0; m < p->M; m++)                                                                              \
            for (size_t r = 0; r < R; r++) p->sums[m * p->F + row + r * apart] = 0;                                    \
        for (size_t start = 0; start < p->D; start += STRETCH) {                                                       \
            part.D = p->D - start < STRETCH ? p->D - start : STRETCH;                                                  \
            part.floats = p->floats + start * p->M;                                                                    \
            for (size_t r = 0; r < R; r++) {                                                                           \
                size_t at = (row + r * apart) * p->D + start;                                                          \
                const uint8_t *codes = (const uint8_t *)p->matrix + at / 2;                                            \
                NAME(expand)(codes, p->groups + at / GROUP * 2, part.D, numbers + r * part.D);                         \
            }                                                                                                          \
            NAME(dots_float32_##R)(&part, 0, 1);                                                                       \
            for (size_t m = 0; m < p->M; m++)                                                                          \
                for (size_t r = 0; r < R; r++) p->sums[m * p->F + row + r * apart] += sums[m * R + r];                 \
        }                                                                                                              \
    }

INT4_DOTS(4)
INT4_DOTS(1)

ALL_ROWS(int4)

/* Rows of a matrix that is (D, F), times their inputs, added up: COUNT rows, `apart` apart, from row k on. Of each vector of
   columns the sums of all rows of inputs lie together. */
#define ADD_ROWS(suffix, type, COUNT)                                                                                  \
    static ALONE void NAME(add_##suffix##_##COUNT)(const struct product *p, float *sums, size_t k, size_t apart) {     \
        const type *rows = (const type *)p->matrix + k * p->F;                                                         \
        size_t f = 0, F = p->F, M = p->M;                                                                              \
        /* Side by side: columns of inputs whose rows are a power of two apart would push each other out of the cache. */\
        float inputs[MAX_ROWS * COUNT];                                                                                \
        for (size_t m = 0; m < M; m++)                                                                                 \
            for (int i = 0; i < COUNT; i++) inputs[m * COUNT + i] = p->floats[m * p->D + k + i * apart];               \
        for (; f + LANES <= F; f += LANES) {                                                                           \
            vector weights[COUNT];                                                                                     \
            if (M > 2) {                                                                                               \
                UNROLLED                                                                                               \
                for (int i = 0; i < COUNT; i++) FETCH(rows + i * apart * F + f + 2048 / sizeof(type));                 \
            }                                                                                                          \
            UNROLLED                                                                                                   \
            for (int i = 0; i < COUNT; i++) weights[i] = NAME(load_##suffix)(rows + i * apart * F + f);                \
            for (size_t m = 0; m < M; m++, sums += LANES) {                                                            \
                vector total = NAME(load_float32)(sums);                                                               \
                UNROLLED                                                                                               \
                for (int i = 0; i < COUNT; i++) total += weights[i] * inputs[m * COUNT + i];                           \
                memcpy(sums, &total, sizeof total);                                                                    \
            }                                                                                                          \
        }                                                                                                              \
        if (f == F) return;                                                                                            \
        for (size_t m = 0; m < M; m++, sums += LANES)                                                                  \
            for (size_t lane = 0; lane < F - f; lane++)                                                                \
                for (int i = 0; i < COUNT; i++)                                                                        \
                    sums[lane] += ONE_##suffix(rows[i * apart * F + f + lane]) * inputs[m * COUNT + i];                \
    }

/* The sums over rows `first` to `last` of the matrix. Processors fetch in advance from several places at a time. */
#define ALL_COLUMNS(suffix, type)                                                                                      \
    ADD_ROWS(suffix, type, 8)                                                                                          \
    ADD_ROWS(suffix, type, 1)                                                                                          \
    static void NAME(suffix##_columns)(const struct product *p, float *sums, size_t first, size_t last) {              \
        size_t eighth = (last - first) / 8;                                                                            \
        memset(sums, 0, p->M * ((p->F + LINE - 1) / LINE * LINE) * sizeof(float));                                    \
        for (size_t k = first; k < first + eighth; k++) NAME(add_##suffix##_8)(p, sums, k, eighth);                    \
        for (size_t k = first + 8 * eighth; k < last; k++) NAME(add_##suffix##_1)(p, sums, k, 0);                      \
    }

ALL_COLUMNS(float32, float)
ALL_COLUMNS(bfloat16, uint16_t)

/* exp(x) for x up to 0: 2^n times the series of 2^f, |f| <= 1/2, whose terms are ln(2)^k / k! f^k. */
static inline float NAME(exponential)(float x) {
    float t = (x < -87 ? -87 : x) * 1.44269504f, whole = (t + 12582912) - 12582912, f = t - whole, power;
    float p = 1.525273380e-05f;
    p = p * f + 1.540353039e-04f;
    p = p * f + 1.333355815e-03f;
    p = p * f + 9.618129108e-03f;
    p = p * f + 5.550410866e-02f;
    p = p * f + 2.402265070e-01f;
    p = p * f + 6.931471806e-01f;
    p = p * f + 1;
    int32_t bits = ((int32_t)whole + 127) * (1 << 23);
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* Scores of slots `first` to `last`, (N, S), with the bias: their exponentials, less the largest of a head. */
static void NAME(weigh)(const struct attention *a, size_t b, size_t first, size_t last, float *scores,
                        const struct share *share) {
    size_t S = last - first, N = a->heads;
    for (size_t n = 0; n < N; n++) {
        float *own = scores + n * S, peak = -INFINITY, total = 0;
        if (a->bias && a->type == BFLOAT16)
            for (size_t s = 0; s < S; s++) own[s] += float_of(((const uint16_t *)a->bias)[b * a->bias_row + first + s]);
        else if (a->bias)
            for (size_t s = 0; s < S; s++) own[s] += ((const float *)a->bias)[b * a->bias_row + first + s];
        for (size_t s = 0; s < S; s++) peak = own[s] > peak ? own[s] : peak;
        for (size_t s = 0; s < S; s++) own[s] = NAME(exponential)(own[s] - peak);
        for (size_t s = 0; s < S; s++) total += own[s];
        share->peaks[b * N + n] = peak;
        share->totals[b * N + n] = total;
    }
}

/* What slots `first` to `last` of row b give to each head: see struct share. */
#define ATTEND_SLOTS(suffix, type)                                                                                     \
    static void NAME(attend_slots_##suffix)(const struct attention *a, size_t b, size_t first, size_t last,            \
                                            float *scores, const struct share *share) {                                \
        size_t S = last - first, N = a->heads, H = a->head_dim, D = N * H;                                             \
        const float *queries = a->queries + b * D;                                                                     \
        const type *keys = (const type *)a->keys + (b * a->capacity + first) * D;                                      \
        const type *values = (const type *)a->values + (b * a->capacity + first) * D;                                  \
        for (size_t s = 0; s < S; s++)                                                                                 \
            for (size_t n = 0; n < N; n++) {                                                                           \
                const type *key = keys + s * D + n * H;                                                                \
                vector total = {0};                                                                                    \
                size_t h = 0;                                                                                          \
                for (; h + LANES <= H; h += LANES)                                                                     \
                    total += NAME(load_float32)(queries + n * H + h) * NAME(load_##suffix)(key + h);                   \
                float score = NAME(sum)(total);                                                                        \
                for (; h < H; h++) score += queries[n * H + h] * ONE_##suffix(key[h]);                                 \
                scores[n * S + s] = score;                                                                             \
            }                                                                                                          \
        NAME(weigh)(a, b, first, last, scores, share);                                                                 \
        float *contexts = share->contexts + b * D;                                                                     \
        memset(contexts, 0, D * sizeof(float));                                                                        \
        for (size_t s = 0; s < S; s++)                                                                                 \
            for (size_t n = 0; n < N; n++) {                                                                           \
                const type *value = values + s * D + n * H;                                                            \
                float weight = scores[n * S + s], *to = contexts + n * H;                                              \
                size_t h = 0;                                                                                          \
                for (; h + LANES <= H; h += LANES) {                                                                   \
                    vector sum = NAME(load_float32)(to + h) + weight * NAME(load_##suffix)(value + h);                 \
                    memcpy(to + h, &sum, sizeof sum);                                                                  \
                }                                                                                                      \
                for (; h < H; h++) to[h] += weight * ONE_##suffix(value[h]);                                           \
            }                                                                                                          \
    }

ATTEND_SLOTS(float32, float)
ATTEND_SLOTS(bfloat16, uint16_t)

/* All shares of a head as one. */
static void NAME(merge_shares)(const struct attention *a, const struct share *shares, int count) {
    size_t heads = a->batch * a->heads, H = a->head_dim;
    for (size_t n = 0; n < heads; n++) {
        float peak = -INFINITY, total = 0, *context = shares[0].contexts + n * H;
        for (int i = 0; i < count; i++)
            if (shares[i].totals[n] != 0 && !(shares[i].peaks[n] <= peak)) peak = shares[i].peaks[n];
        for (int i = 0; i < count; i++) {
            const float *other = shares[i].contexts + n * H;
            if (shares[i].totals[n] == 0) continue;
            float factor = NAME(exponential)(shares[i].peaks[n] - peak);
            /* The first that counts may be any of them. */
            for (size_t h = 0; h < H; h++) context[h] = (total == 0 ? 0 : context[h]) + factor * other[h];
            total += factor * shares[i].totals[n];
        }
        for (size_t h = 0; h < H; h++) context[h] /= total;
        if (a->type == BFLOAT16)
            for (size_t h = 0; h < H; h++) ((uint16_t *)a->outputs)[n * H + h] = bfloat16_of(context[h]);
        else
            memcpy((float *)a->outputs + n * H, context, H * sizeof(float));
    }
}

/* Sums of products of HEIGHT rows of numbers, `apart` apart, each number `along` from the next, with `depth` rows of TOGETHER
   numbers: row i of sums goes to to[i * TOGETHER]. */
#define TOGETHER (2 * LANES)
#define PANEL(HEIGHT)                                                                                                  \
    static ALONE void NAME(panel_##HEIGHT)(const float *rows, size_t apart, size_t along, size_t depth,                \
                                           const float *columns, float *to) {                                          \
        vector totals[HEIGHT][2];                                                                                      \
        UNROLLED                                                                                                       \
        for (int i = 0; i < HEIGHT; i++) totals[i][0] = totals[i][1] = (vector){0};                                    \
        for (size_t d = 0; d < depth; d++, rows += along, columns += TOGETHER) {                                       \
            vector first = NAME(load_float32)(columns), second = NAME(load_float32)(columns + LANES);                  \
            UNROLLED                                                                                                   \
            for (int i = 0; i < HEIGHT; i++) {                                                                         \
                totals[i][0] += rows[i * apart] * first;                                                               \
                totals[i][1] += rows[i * apart] * second;                                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (int i = 0; i < HEIGHT; i++) memcpy(to + i * TOGETHER, totals[i], sizeof totals[i]);                       \
    }

/* As many as the registers hold. */
#if SET == AVX512
#define TALL 8
PANEL(8)
#define NAME_TALL NAME(panel_8)
#else
#define TALL 4
PANEL(4)
#define NAME_TALL NAME(panel_4)
#endif
PANEL(1)

static void NAME(panels)(const float *rows, size_t apart, size_t along, size_t count, size_t depth, const float *columns,
                         float *to) {
    size_t i = 0;
    for (; i + TALL <= count; i += TALL) NAME_TALL(rows + i * apart, apart, along, depth, columns, to + i * TOGETHER);
    for (; i < count; i++) NAME(panel_1)(rows + i * apart, apart, along, depth, columns, to + i * TOGETHER);
}

/* Attention of TOGETHER queries of one head, from `first` on, to the keys up to their own. Everything is turned over, so that
   the queries lie side by side: scores are (keys, queries), contexts (H, queries). */
static void NAME(attend_queries)(const struct prompt *p, size_t b, size_t n, size_t first, const float *keys,
                                 const float *values, float *space) {
    size_t H = p->head_dim, count = p->tokens - first < TOGETHER ? p->tokens - first : TOGETHER, last = first + count;
    float *queries = space, *contexts = queries + H * TOGETHER, *scores = contexts + H * TOGETHER;
    float peaks[TOGETHER], totals[TOGETHER] = {0};
    memset(queries, 0, H * TOGETHER * sizeof(float));
    for (size_t j = 0; j < count; j++) {
        size_t at = (b * p->tokens + first + j) * p->query_apart + n * H;
        for (size_t h = 0; h < H; h++) queries[h * TOGETHER + j] = number_of(p->type, p->queries, at + h);
    }
    NAME(panels)(keys, H, 1, last, H, queries, scores);
    for (size_t k = first + 1; k < last; k++)
        for (size_t j = 0; j < k - first; j++) scores[k * TOGETHER + j] = -INFINITY;
    for (size_t j = 0; j < TOGETHER; j++) peaks[j] = -INFINITY;
    for (size_t k = 0; k < last; k++)
        for (size_t j = 0; j < TOGETHER; j++) {
            float score = scores[k * TOGETHER + j];
            peaks[j] = score > peaks[j] ? score : peaks[j];
        }
    for (size_t k = 0; k < last; k++)
        for (size_t j = 0; j < TOGETHER; j++) {
            float weight = NAME(exponential)(scores[k * TOGETHER + j] - peaks[j]);
            scores[k * TOGETHER + j] = weight;
            totals[j] += weight;
        }
    NAME(panels)(values, 1, H, H, last, scores, contexts);
    for (size_t j = 0; j < count; j++) {
        size_t at = ((b * p->tokens + first + j) * p->heads + n) * H;
        for (size_t h = 0; h < H; h++) {
            float value = contexts[h * TOGETHER + j] / totals[j];
            if (p->type == BFLOAT16)
                ((uint16_t *)p->outputs)[at + h] = bfloat16_of(value);
            else
                ((float *)p->outputs)[at + h] = value;
        }
    }
}

static const struct set NAME(set) = {
    .lanes = LANES,
    .round_inputs = NAME(round_inputs),
    .order_inputs = NAME(order_inputs),
    .finish = NAME(finish),
    .attend_slots = {[FLOAT32] = NAME(attend_slots_float32), [BFLOAT16] = NAME(attend_slots_bfloat16)},
    .merge_shares = NAME(merge_shares),
    .together = TOGETHER,
    .attend_queries = NAME(attend_queries),
    .rows =
        {
            [FLOAT32_ROWS] = NAME(float32_rows),
            [BFLOAT16_ROWS] = NAME(bfloat16_rows),
            [INT8_ROWS] = NAME(int8_rows),
            [INT8_DYNAMIC_ROWS] = NAME(int8_dynamic_rows),
            [INT4_ROWS] = NAME(int4_rows),
        },
    .columns =
        {
            [FLOAT32_COLUMNS] = NAME(float32_columns),
            [BFLOAT16_COLUMNS] = NAME(bfloat16_columns),
        },
};

#undef vector
#undef ROWS
#undef IF_ROWS_4
#undef DOTS
#undef DOTS_OF_ALL
#undef INTEGER_DOTS
#undef INTEGER_DOTS_OF_ALL
#undef SINGLE_INT4_DOTS
#undef INT4_DOTS
#undef ALL_ROWS
#undef ADD_ROWS
#undef ALL_COLUMNS
#undef AHEAD
#undef ATTEND_SLOTS
#undef TOGETHER
#undef PANEL
#undef TALL
#undef NAME_TALL
#undef ONE_float32
#undef ONE_bfloat16
#undef ONE_int8
