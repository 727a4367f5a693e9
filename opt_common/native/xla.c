/* The products as XLA's programs call them: handlers of its foreign function interface, which JAX and TensorFlow share.

   What is declared here of that interface is its binary form, as far as it is used. A handler says which version of the
   interface it is for; an XLA that has left it refuses the handler, and Python then does without. */

#include "products.h"

#include <stdint.h>
#include <string.h>

enum { METADATA_EXTENSION = 1, EXECUTE_STAGE = 3, XLA_BFLOAT16 = 16 };
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

struct span {
    const char *start;
    size_t length;
};

typedef struct error error;
typedef struct frame frame;
typedef error *handler(frame *);

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

/* Inputs (M, D), matrix, scales if it has some, and bias if there is one, to outputs (M, F). */
static error *multiply(frame *frame, int kind) {
    if (frame->extensions && frame->extensions->type == METADATA_EXTENSION) {
        struct metadata *metadata = ((struct metadata_extension *)frame->extensions)->metadata;
        metadata->version.major = VERSION_MAJOR;
        metadata->version.minor = VERSION_MINOR;
        metadata->traits = 0;
        return NULL;
    }
    int columns = kind == FLOAT32_COLUMNS || kind == BFLOAT16_COLUMNS;
    int scaled = kind == INT8_ROWS || kind == INT8_DYNAMIC_ROWS;
    int64_t count = frame->arguments.count;
    struct buffer **arguments = frame->arguments.buffers;
    if ((count != 2 + scaled && count != 3 + scaled) || frame->results.count != 1)
        return failure(frame, "a product has inputs, a matrix, scales if it is rounded, and maybe a bias", INVALID_ARGUMENT);
    struct buffer *inputs = arguments[0], *matrix = arguments[1], *outputs = frame->results.buffers[0];
    struct buffer *bias = count == 3 + scaled ? arguments[2 + scaled] : NULL;
    if (inputs->rank != 2 || matrix->rank != 2 || outputs->rank != 2)
        return failure(frame, "inputs, matrix and outputs of a product are matrices", INVALID_ARGUMENT);
    size_t M = inputs->dimensions[0], D = inputs->dimensions[1], F = outputs->dimensions[1];
    if ((size_t)matrix->dimensions[columns ? 0 : 1] != D || (size_t)matrix->dimensions[columns ? 1 : 0] != F ||
        (size_t)outputs->dimensions[0] != M || M > MAX_ROWS)
        return failure(frame, "the shapes of a product do not fit", INVALID_ARGUMENT);
    int result = opt_product(kind, 0, NULL, M, D, F, inputs->data, inputs->type == XLA_BFLOAT16, matrix->data,
                             scaled ? arguments[2]->data : NULL, bias ? bias->data : NULL,
                             bias && bias->type == XLA_BFLOAT16, outputs->data, outputs->type == XLA_BFLOAT16);
    return result == 0 ? NULL : failure(frame, "no memory for a product", RESOURCE_EXHAUSTED);
}

error *opt_xla_float32_rows(frame *frame) { return multiply(frame, FLOAT32_ROWS); }
error *opt_xla_bfloat16_rows(frame *frame) { return multiply(frame, BFLOAT16_ROWS); }
error *opt_xla_int8_rows(frame *frame) { return multiply(frame, INT8_ROWS); }
error *opt_xla_int8_dynamic_rows(frame *frame) { return multiply(frame, INT8_DYNAMIC_ROWS); }
error *opt_xla_float32_columns(frame *frame) { return multiply(frame, FLOAT32_COLUMNS); }
error *opt_xla_bfloat16_columns(frame *frame) { return multiply(frame, BFLOAT16_COLUMNS); }

/* Make a handler known under a name to the XLA whose interface this is. Returns 0, or -1 where it is refused. */
int opt_xla_register(const struct api *api, const char *name, handler *execute) {
    if (api->struct_size < sizeof *api || api->version.major != VERSION_MAJOR) return -1;
    struct handler_arguments arguments = {
        .struct_size = sizeof arguments,
        .name = {name, strlen(name)},
        .platform = {"Host", 4},
        .execute = execute,
    };
    return api->register_handler(&arguments) == NULL ? 0 : -1;
}
