/* SPDX-License-Identifier: Apache-2.0 */
/* Virtual memory: addresses are reserved first, and physical memory is mapped to them later.

   Physical memory is a mapping of its own. To map it to a reserved address moves its pages there, and to unmap it moves
   them back, contents and all; reserved addresses without memory fault when they are touched. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "acl/acl_rt.h"
#include "emulator.h"

struct physical {
    char *own; /* where its pages are while they are mapped nowhere else */
    size_t bytes;
};

/* What is where: reserved ranges, and physical memory that is mapped. */
struct range {
    char *address;
    size_t bytes;
    struct physical *mapped; /* NULL for a reserved range */
    struct range *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct range *ranges;

static void *no_access(void *address, size_t bytes, int fixed)
{
    void *made = mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
    return made == MAP_FAILED ? NULL : made;
}

static int add(char *address, size_t bytes, struct physical *mapped)
{
    struct range *range = malloc(sizeof *range);
    if (range == NULL) {
        return 0;
    }
    pthread_mutex_lock(&lock);
    *range = (struct range){address, bytes, mapped, ranges};
    ranges = range;
    pthread_mutex_unlock(&lock);
    return 1;
}

/* Take out what begins at `address`: a reserved range, or physical memory. Returns a range without bytes if none does. */
static struct range take_out(const void *address, int is_mapped)
{
    struct range found = {0};
    pthread_mutex_lock(&lock);
    for (struct range **link = &ranges; *link != NULL; link = &(*link)->next) {
        struct range *range = *link;
        if (range->address == address && (range->mapped != NULL) == is_mapped) {
            found = *range;
            *link = range->next;
            free(range);
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}

aclError aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *wanted, uint64_t flags)
{
    (void)alignment; /* that of pages, and CANN asks for 0 */
    (void)wanted;
    (void)flags;
    *address = no_access(NULL, bytes, 0);
    return *address != NULL && add(*address, bytes, NULL) ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}

aclError aclrtReleaseMemAddress(void *address)
{
    struct range range = take_out(address, 0);
    if (range.bytes == 0) {
        return ACL_ERROR_INVALID_PARAM;
    }
    munmap(range.address, range.bytes);
    return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t bytes, const aclrtPhysicalMemProp *properties,
                             uint64_t flags)
{
    (void)properties;
    (void)flags;
    struct physical *made = malloc(sizeof *made);
    void *own = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == NULL || own == MAP_FAILED) {
        free(made);
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    npu_fill_new_memory(own, bytes);
    *made = (struct physical){own, bytes};
    *handle = (aclrtDrvMemHandle)made;
    return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle)
{
    struct physical *physical = (struct physical *)handle;
    npu_drain_all();
    munmap(physical->own, physical->bytes);
    free(physical);
    return ACL_SUCCESS;
}

aclError aclrtMapMem(void *address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t flags)
{
    (void)flags;
    struct physical *physical = (struct physical *)handle;
    if (offset != 0 || bytes != physical->bytes) {
        npu_die("aclrtMapMem of %zu bytes at offset %zu of %zu: only the whole of it is emulated", bytes, offset,
                physical->bytes);
    }
    if (mremap(physical->own, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, address) == MAP_FAILED) {
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    physical->own = address;
    return add(address, bytes, physical) ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}

aclError aclrtUnmapMem(void *address)
{
    npu_drain_all(); /* what is in a queue may still use the memory */
    struct range range = take_out(address, 1);
    if (range.bytes == 0) {
        return ACL_ERROR_INVALID_PARAM;
    }
    void *moved = mremap(range.address, range.bytes, range.bytes, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (moved == MAP_FAILED) {
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    range.mapped->own = moved;
    return no_access(range.address, range.bytes, MAP_FIXED) != NULL ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}
