/* SPDX-License-Identifier: Apache-2.0 */
/* Operators of CANN that torch_npu calls without going through PyTorch's dispatcher, where aten.py could serve them.

   There is one that matters: its process group pads the tensors of a list with zeros to the alignment of HCCL. CANN's
   operators are called twice: with descriptions of the operands, for an executor; and with the executor, to run. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl_rt.h"
#include "emulator.h"

#define MOST_DIMS 8

typedef struct aclTensor {
    int dims;
    int64_t sizes[MOST_DIMS], strides[MOST_DIMS]; /* strides in elements */
    size_t element;
    char *first; /* element */
} aclTensor;

typedef struct aclIntArray {
    uint64_t count;
    int64_t values[2 * MOST_DIMS];
} aclIntArray;

typedef struct aclScalar {
    int is_zero;
} aclScalar;

typedef struct aclOpExecutor {
    aclTensor from, to;
    aclIntArray padding; /* before and after, of the last dim first, as in torch.nn.functional.pad */
} aclOpExecutor;

static size_t element_bytes(aclDataType type)
{
    switch (type) {
    case ACL_INT8: case ACL_UINT8: case ACL_BOOL:
        return 1;
    case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: case ACL_UINT16:
        return 2;
    case ACL_FLOAT: case ACL_INT32: case ACL_UINT32:
        return 4;
    case ACL_INT64: case ACL_UINT64: case ACL_DOUBLE:
        return 8;
    default:
        npu_die("an operator of CANN was called with data type %d, which is not emulated", (int)type);
    }
}

static void *take(size_t bytes)
{
    void *memory = calloc(1, bytes);
    if (memory == NULL) {
        npu_die("no memory for an operand");
    }
    return memory;
}

aclTensor *aclCreateTensor(const int64_t *sizes, uint64_t dims, aclDataType type, const int64_t *strides,
                           int64_t offset, aclFormat format, const int64_t *storage_sizes, uint64_t storage_dims,
                           void *storage)
{
    (void)format;
    (void)storage_sizes;
    (void)storage_dims;
    if (dims > MOST_DIMS) {
        npu_die("an operator of CANN was called with %lu dims; at most %d are emulated", (unsigned long)dims,
                MOST_DIMS);
    }
    aclTensor *tensor = take(sizeof *tensor);
    tensor->dims = (int)dims;
    memcpy(tensor->sizes, sizes, dims * sizeof *sizes);
    memcpy(tensor->strides, strides, dims * sizeof *strides);
    tensor->element = element_bytes(type);
    tensor->first = (char *)storage + (size_t)offset * tensor->element;
    return tensor;
}

int aclDestroyTensor(const aclTensor *tensor)
{
    free((void *)tensor);
    return ACL_SUCCESS;
}

aclIntArray *aclCreateIntArray(const int64_t *values, uint64_t count)
{
    if (count > 2 * MOST_DIMS) {
        npu_die("an operator of CANN was called with %lu integers; at most %d are emulated", (unsigned long)count,
                2 * MOST_DIMS);
    }
    aclIntArray *array = take(sizeof *array);
    array->count = count;
    memcpy(array->values, values, count * sizeof *values);
    return array;
}

int aclDestroyIntArray(const aclIntArray *array)
{
    free((void *)array);
    return ACL_SUCCESS;
}

aclScalar *aclCreateScalar(void *value, aclDataType type)
{
    static const char zeros[8];
    aclScalar *scalar = take(sizeof *scalar);
    scalar->is_zero = memcmp(value, zeros, element_bytes(type)) == 0;
    return scalar;
}

int aclDestroyScalar(const aclScalar *scalar)
{
    free((void *)scalar);
    return ACL_SUCCESS;
}

int aclnnConstantPadNdGetWorkspaceSize(const aclTensor *from, const aclIntArray *padding, const aclScalar *value,
                                       aclTensor *to, uint64_t *workspace, aclOpExecutor **executor)
{
    if (!value->is_zero) {
        npu_die("aclnnConstantPadNd is emulated for zeros only");
    }
    *executor = take(sizeof **executor);
    **executor = (aclOpExecutor){*from, *to, *padding};
    *workspace = 0;
    return ACL_SUCCESS;
}

/* Fill the part of `to` from `dim` on; `from` is the element that came from the same place, or NULL in the padding. */
static void pad(const aclOpExecutor *executor, int dim, const char *from, char *to)
{
    const aclTensor *source = &executor->from, *target = &executor->to;
    if (dim == target->dims) {
        if (from == NULL) {
            memset(to, 0, target->element);
        } else {
            memcpy(to, from, target->element);
        }
        return;
    }
    uint64_t pair = 2 * (uint64_t)(target->dims - 1 - dim);
    int64_t before = pair < executor->padding.count ? executor->padding.values[pair] : 0;
    for (int64_t i = 0; i < target->sizes[dim]; i++) {
        int64_t place = i - before;
        int inside = from != NULL && place >= 0 && place < source->sizes[dim];
        int64_t step = place * source->strides[dim] * (int64_t)source->element;
        pad(executor, dim + 1, inside ? from + step : NULL, to + i * target->strides[dim] * (int64_t)target->element);
    }
}

static void run_pad(void *argument)
{
    aclOpExecutor *executor = argument;
    pad(executor, 0, executor->from.first, executor->to.first);
    free(executor);
}

int aclnnConstantPadNd(void *workspace, uint64_t workspace_bytes, aclOpExecutor *executor, aclrtStream stream)
{
    (void)workspace;
    (void)workspace_bytes;
    npu_enqueue(stream, run_pad, executor, 0);
    return ACL_SUCCESS;
}
