/* Products and attention as XLA's programs call them: handlers of its foreign function interface.

   What is declared here of that interface is its binary form, as far as it is used. A handler says which version of the
   interface it is for; an XLA that has left it refuses the handler, and Python then does without. */

#include "products.h"

#include <stdint.h>
#include <string.h>

enum { METADATA_EXTENSION = 1, XLA_INT8 = 2, XLA_INT32 = 4, XLA_FLOAT32 = 11, XLA_BFLOAT16 = 16 };
enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };
enum { VERSION_MAJOR = 0, VERSION_MINOR = 2 };

struct extension {
    size_t struct_size;
    int type;
    struct extension *next;
};

struct version {
    size_t struct_size;
    struct extension *extensions;
    int major, minor;
};

struct metadata {
    size_t struct_size;
    struct version version;
    uint32_t traits;
};

struct metadata_extension {
    struct extension base;
    struct metadata *metadata;
};

struct error_arguments {
    size_t struct_size;
    struct extension *extensions;
    const char *message;
    int code;
};

typedef struct error error;
typedef struct frame frame;
typedef error *handler(frame *);

struct span {
    const char *start;
    size_t length;
};

struct handler_arguments {
    size_t struct_size;
    struct extension *extensions;
    struct span name, platform;
    handler *instantiate, *prepare, *initialize, *execute;
    uint32_t traits;
};

struct api {
    size_t struct_size;
    struct extension *extensions;
    struct version version;
    const void *internal;
    error *(*create_error)(struct error_arguments *);
    void *get_message, *destroy_error;
    error *(*register_handler)(struct handler_arguments *);
};

struct buffer {
    size_t struct_size;
    struct extension *extensions;
    int type;
    void *data;
    int64_t rank, *dimensions;
};

struct buffers {
    size_t struct_size;
    struct extension *extensions;
    int64_t count;
    int *types;
    struct buffer **buffers;
};

struct frame {
    size_t struct_size;
    struct extension *extensions;
    const struct api *api;
    void *context;
    int stage;
    struct buffers arguments, results;
};

static error *failure(frame *frame, const char *message, int code) {
    struct error_arguments arguments = {sizeof arguments, NULL, message, code};
    return frame->api->create_error(&arguments);
}

/* What a handler answers to a question about itself; 0 where it is called to compute. */
static int is_question(frame *frame) {
    if (!frame->extensions || frame->extensions->type != METADATA_EXTENSION) return 0;
    struct metadata *metadata = ((struct metadata_extension *)frame->extensions)->metadata;
    metadata->version.major = VERSION_MAJOR;
    metadata->version.minor = VERSION_MINOR;
    metadata->traits = 0;
    return 1;
}

/* What each kind of matrix is made of. */
static const struct {
    int type, columns, scaled;
} forms[KINDS] = {
    [FLOAT32_ROWS] = {XLA_FLOAT32, 0, 0},
    [BFLOAT16_ROWS] = {XLA_BFLOAT16, 0, 0},
    [INT8_DYNAMIC_ROWS] = {XLA_INT8, 0, 1},
    [FLOAT32_COLUMNS] = {XLA_FLOAT32, 1, 0},
    [BFLOAT16_COLUMNS] = {XLA_BFLOAT16, 1, 0},
};

static int is_number(int type) { return type == XLA_FLOAT32 || type == XLA_BFLOAT16; }

/* Inputs (M, D), a matrix and its scales, if it has some, to outputs (M, F). */
static error *multiply(frame *frame, int kind) {
    if (is_question(frame)) return NULL;
    int columns = forms[kind].columns, scaled = forms[kind].scaled;
    struct buffer **arguments = frame->arguments.buffers;
    if (frame->arguments.count != 2 + scaled || frame->results.count != 1)
        return failure(frame, "a product has inputs, a matrix, and scales if it is rounded", INVALID_ARGUMENT);
    struct buffer *inputs = arguments[0], *matrix = arguments[1], *outputs = frame->results.buffers[0];
    if (!is_number(inputs->type) || matrix->type != forms[kind].type || !is_number(outputs->type) ||
        (scaled && arguments[2]->type != XLA_FLOAT32))
        return failure(frame, "the types of a product are not those of its kind", INVALID_ARGUMENT);
    if (inputs->rank != 2 || matrix->rank != 2 || outputs->rank != 2)
        return failure(frame, "inputs, matrix and outputs of a product are matrices", INVALID_ARGUMENT);
    size_t M = inputs->dimensions[0], D = inputs->dimensions[1], F = outputs->dimensions[1];
    if ((size_t)matrix->dimensions[!columns] != D || (size_t)matrix->dimensions[columns] != F ||
        (size_t)outputs->dimensions[0] != M ||
        (scaled && (arguments[2]->rank != 1 || (size_t)arguments[2]->dimensions[0] != F)))
        return failure(frame, "the shapes of a product do not fit", INVALID_ARGUMENT);
    int result = opt_product(kind, 0, NULL, M, D, F, inputs->data, inputs->type == XLA_BFLOAT16, matrix->data,
                             scaled ? arguments[2]->data : NULL, NULL, FLOAT32, outputs->data,
                             outputs->type == XLA_BFLOAT16);
    return result == 0 ? NULL : failure(frame, "no memory for a product", RESOURCE_EXHAUSTED);
}

error *opt_float32_rows_xla(frame *frame) { return multiply(frame, FLOAT32_ROWS); }
error *opt_bfloat16_rows_xla(frame *frame) { return multiply(frame, BFLOAT16_ROWS); }
error *opt_int8_dynamic_rows_xla(frame *frame) { return multiply(frame, INT8_DYNAMIC_ROWS); }
error *opt_float32_columns_xla(frame *frame) { return multiply(frame, FLOAT32_COLUMNS); }
error *opt_bfloat16_columns_xla(frame *frame) { return multiply(frame, BFLOAT16_COLUMNS); }

/* Queries, keys and values (B, 1, N, H), buffers of keys and values (B, S, N, H), the slot of the new token and the bias,
   (B or 1, 1, 1, S), to the context (B, 1, N, H) and the buffers with the new token. XLA is asked to give the results
   the place of the buffers; where it does not, they are copied. */
error *opt_attention_xla(frame *frame) {
    if (is_question(frame)) return NULL;
    if (frame->arguments.count != 7 || frame->results.count != 3)
        return failure(frame, "attention has seven arguments and three results", INVALID_ARGUMENT);
    struct buffer **arguments = frame->arguments.buffers, **results = frame->results.buffers;
    struct buffer *queries = arguments[0], *buffers = arguments[3], *slot = arguments[5], *bias = arguments[6];
    static const int ranks[7] = {4, 4, 4, 4, 4, 0, 4};
    for (int i = 0; i < 7; i++)
        if (arguments[i]->rank != ranks[i] || (i != 5 && !is_number(arguments[i]->type)))
            return failure(frame, "arguments of attention have four dimensions, and the slot has none", INVALID_ARGUMENT);
    size_t B = buffers->dimensions[0], S = buffers->dimensions[1];
    size_t N = buffers->dimensions[2], H = buffers->dimensions[3];
    for (int i = 0; i < 5; i++) {
        size_t length = i < 3 ? 1 : S;
        const int64_t *d = arguments[i]->dimensions;
        if ((size_t)d[0] != B || (size_t)d[1] != length || (size_t)d[2] != N || (size_t)d[3] != H ||
            arguments[i]->type != arguments[i < 3 ? 0 : 3]->type)
            return failure(frame, "the shapes or types of attention do not fit", INVALID_ARGUMENT);
    }
    if (slot->type != XLA_INT32 || *(const int32_t *)slot->data < 0 || (size_t)*(const int32_t *)slot->data >= S)
        return failure(frame, "the slot of attention is not one of the buffers'", INVALID_ARGUMENT);
    if (bias->type != queries->type || (size_t)bias->dimensions[3] != S || (bias->dimensions[0] != 1 && (size_t)bias->dimensions[0] != B))
        return failure(frame, "the bias of attention does not fit", INVALID_ARGUMENT);
    int type = queries->type == XLA_BFLOAT16, buffer_type = buffers->type == XLA_BFLOAT16;
    for (int i = 1; i < 3; i++)
        if (results[i]->data != arguments[2 + i]->data)
            memcpy(results[i]->data, arguments[2 + i]->data, B * S * N * H * (buffer_type ? 2 : 4));
    int result = opt_attention(0, NULL, B, N, H, S, *(const int32_t *)slot->data, queries->data, N * H,
                               arguments[1]->data, arguments[2]->data, N * H, type, bias->data,
                               bias->dimensions[0] == 1 ? 0 : S, results[1]->data, results[2]->data, buffer_type,
                               results[0]->data);
    return result == 0 ? NULL : failure(frame, "no memory for attention", RESOURCE_EXHAUSTED);
}

/* Make a handler known under a name to the XLA whose interface this is. Returns 0, or -1 where it is refused. */
int opt_register_xla(const struct api *api, const char *name, handler *execute) {
    if (api->struct_size < sizeof *api || api->version.major != VERSION_MAJOR) return -1;
    struct handler_arguments arguments = {
        .struct_size = sizeof arguments,
        .name = {name, strlen(name)},
        .platform = {"Host", 4},
        .execute = execute,
    };
    return api->register_handler(&arguments) == NULL ? 0 : -1;
}
