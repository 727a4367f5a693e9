/* A product as XLA's programs call it: a handler of its foreign function interface.

   What is declared here of that interface is its binary form, as far as it is used. A handler says which version of the
   interface it is for; an XLA that has left it refuses the handler, and Python then does without. */

#include "products.h"

#include <stdint.h>

enum { METADATA_EXTENSION = 1, XLA_INT8 = 2, XLA_FLOAT32 = 11 };
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
struct api {
    size_t struct_size;
    struct extension *extensions;
    struct version version;
    const void *internal;
    error *(*create_error)(struct error_arguments *);
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

/* Inputs (M, D), integers (F, D) and scales (F,) to outputs (M, F), all float32 but the integers. */
error *opt_xla_int8_dynamic_rows(frame *frame) {
    if (frame->extensions && frame->extensions->type == METADATA_EXTENSION) {
        struct metadata *metadata = ((struct metadata_extension *)frame->extensions)->metadata;
        metadata->version.major = VERSION_MAJOR;
        metadata->version.minor = VERSION_MINOR;
        metadata->traits = 0;
        return NULL;
    }
    if (frame->arguments.count != 3 || frame->results.count != 1)
        return failure(frame, "a product has inputs, integers and scales", INVALID_ARGUMENT);
    struct buffer *inputs = frame->arguments.buffers[0], *matrix = frame->arguments.buffers[1];
    struct buffer *scales = frame->arguments.buffers[2], *outputs = frame->results.buffers[0];
    if (inputs->type != XLA_FLOAT32 || matrix->type != XLA_INT8 || scales->type != XLA_FLOAT32 ||
        outputs->type != XLA_FLOAT32)
        return failure(frame, "the types of a product are float32 and, of its matrix, int8", INVALID_ARGUMENT);
    if (inputs->rank != 2 || matrix->rank != 2 || scales->rank != 1 || outputs->rank != 2)
        return failure(frame, "inputs, matrix and outputs of a product are matrices", INVALID_ARGUMENT);
    size_t M = inputs->dimensions[0], D = inputs->dimensions[1], F = outputs->dimensions[1];
    if ((size_t)matrix->dimensions[1] != D || (size_t)matrix->dimensions[0] != F ||
        (size_t)scales->dimensions[0] != F || (size_t)outputs->dimensions[0] != M)
        return failure(frame, "the shapes of a product do not fit", INVALID_ARGUMENT);
    int result = opt_product(INT8_DYNAMIC_ROWS, 0, NULL, M, D, F, inputs->data, FLOAT32, matrix->data, scales->data, NULL,
                             FLOAT32, outputs->data, FLOAT32);
    return result == 0 ? NULL : failure(frame, "no memory for a product", RESOURCE_EXHAUSTED);
}
