/* SPDX-License-Identifier: Apache-2.0 */
/* A framework's own allocator, which CANN would ask for the workspaces of operators. Those here need none, so that it is
   taken and never asked. */
#include <stdlib.h>

#include "acl/acl_rt_allocator.h"
#include "emulator.h"

aclrtAllocatorDesc aclrtAllocatorCreateDesc(void)
{
    return calloc(1, 1);
}

aclError aclrtAllocatorDestroyDesc(aclrtAllocatorDesc description)
{
    free(description);
    return ACL_SUCCESS;
}

#define TAKE(FUNCTION, KIND)                                                                                           \
    aclError FUNCTION(aclrtAllocatorDesc description, KIND given)                                                      \
    {                                                                                                                  \
        (void)description;                                                                                             \
        (void)given;                                                                                                   \
        return ACL_SUCCESS;                                                                                            \
    }

TAKE(aclrtAllocatorSetObjToDesc, aclrtAllocator)
TAKE(aclrtAllocatorSetAllocFuncToDesc, aclrtAllocatorAllocFunc)
TAKE(aclrtAllocatorSetFreeFuncToDesc, aclrtAllocatorFreeFunc)
TAKE(aclrtAllocatorSetAllocAdviseFuncToDesc, aclrtAllocatorAllocAdviseFunc)
TAKE(aclrtAllocatorSetGetAddrFromBlockFuncToDesc, aclrtAllocatorGetAddrFromBlockFunc)

aclError aclrtAllocatorRegister(aclrtStream stream, aclrtAllocatorDesc description)
{
    (void)stream;
    (void)description;
    return ACL_SUCCESS;
}

aclError aclrtAllocatorUnregister(aclrtStream stream)
{
    (void)stream;
    return ACL_SUCCESS;
}
