/* SPDX-License-Identifier: Apache-2.0 */
/* Memory: host memory that plays the device's, and copies, of which the asynchronous ones really are. */
#include <stdlib.h>
#include <string.h>

#include "acl/acl_rt.h"
#include "emulator.h"

#define ALIGNMENT 512 /* bytes; torch_npu's allocator counts on it */
#define GARBAGE 0xF7

void npu_fill_new_memory(void *address, size_t bytes)
{
    memset(address, GARBAGE, bytes);
}

static aclError take(void **address, size_t bytes)
{
    size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *address = aligned_alloc(ALIGNMENT, rounded == 0 ? ALIGNMENT : rounded);
    if (*address == NULL) {
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    npu_fill_new_memory(*address, rounded);
    return ACL_SUCCESS;
}

aclError aclrtMalloc(void **address, size_t bytes, aclrtMemMallocPolicy policy)
{
    (void)policy;
    return take(address, bytes);
}

aclError aclrtMallocAlign32(void **address, size_t bytes, aclrtMemMallocPolicy policy)
{
    (void)policy;
    return take(address, bytes);
}

aclError aclrtMallocHost(void **address, size_t bytes)
{
    return take(address, bytes);
}

aclError aclrtFree(void *address)
{
    npu_drain_all(); /* as on hardware: what is in a queue may still use the memory */
    free(address);
    return ACL_SUCCESS;
}

aclError aclrtFreeHost(void *address)
{
    return aclrtFree(address);
}

aclError aclrtMemcpy(void *to, size_t capacity, const void *from, size_t bytes, aclrtMemcpyKind kind)
{
    (void)kind;
    if (bytes > capacity) {
        return ACL_ERROR_INVALID_PARAM;
    }
    memmove(to, from, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemset(void *to, size_t capacity, int32_t value, size_t bytes)
{
    if (bytes > capacity) {
        return ACL_ERROR_INVALID_PARAM;
    }
    memset(to, value, bytes);
    return ACL_SUCCESS;
}

struct copy {
    void *to;
    const void *from; /* NULL: fill with value */
    size_t bytes;
    int value;
};

static void run_copy(void *argument)
{
    struct copy *copy = argument;
    if (copy->from == NULL) {
        memset(copy->to, copy->value, copy->bytes);
    } else {
        memmove(copy->to, copy->from, copy->bytes);
    }
    free(copy);
}

static aclError enqueue_copy(struct copy copy, size_t capacity, aclrtStream stream)
{
    if (copy.bytes > capacity) {
        return ACL_ERROR_INVALID_PARAM;
    }
    struct copy *kept = malloc(sizeof *kept);
    if (kept == NULL) {
        npu_die("no memory for a copy");
    }
    *kept = copy;
    npu_enqueue(stream, run_copy, kept, 1);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t capacity, const void *from, size_t bytes, aclrtMemcpyKind kind,
                          aclrtStream stream)
{
    (void)kind;
    return enqueue_copy((struct copy){.to = to, .from = from, .bytes = bytes}, capacity, stream);
}

aclError aclrtMemsetAsync(void *to, size_t capacity, int32_t value, size_t bytes, aclrtStream stream)
{
    return enqueue_copy((struct copy){.to = to, .bytes = bytes, .value = value}, capacity, stream);
}
