/* SPDX-License-Identifier: Apache-2.0 */
/* Devices: which there are, which is current, what they say of themselves. */
#include <string.h>
#include <unistd.h>

#include "acl/acl.h"
#include "emulator.h"

#define DEVICE_BYTES ((size_t)8 << 30)

static __thread int32_t current_device;

aclError aclInit(const char *configuration)
{
    (void)configuration;
    return ACL_SUCCESS;
}

aclError aclFinalize(void)
{
    return ACL_SUCCESS;
}

aclError aclrtGetDeviceCount(uint32_t *count)
{
    *count = (uint32_t)npu_device_count();
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device)
{
    if (device < 0 || device >= npu_device_count()) {
        return ACL_ERROR_RT_INVALID_DEVICEID;
    }
    current_device = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device)
{
    *device = current_device;
    return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t device)
{
    (void)device;
    npu_drain_all();
    return ACL_SUCCESS;
}

/* A context is nothing but the number of its device; one is added so that the handle is never NULL. */
aclError aclrtGetCurrentContext(aclrtContext *context)
{
    *context = (aclrtContext)(intptr_t)(current_device + 1);
    return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context)
{
    return aclrtSetDevice((int32_t)(intptr_t)context - 1);
}

aclError aclrtCreateContext(aclrtContext *context, int32_t device)
{
    aclError result = aclrtSetDevice(device);
    aclrtGetCurrentContext(context);
    return result;
}

aclError aclrtDestroyContext(aclrtContext context)
{
    (void)context;
    return ACL_SUCCESS;
}

aclError aclrtGetRunMode(aclrtRunMode *mode)
{
    *mode = ACL_HOST; /* programs run beside the device, not on it */
    return ACL_SUCCESS;
}

aclError aclrtDeviceGetStreamPriorityRange(int32_t *least, int32_t *greatest)
{
    *least = 7;
    *greatest = 0;
    return ACL_SUCCESS;
}

const char *aclrtGetSocName(void)
{
    return "Ascend910B1"; /* a name that the frameworks know; it decides which operators they think there are */
}

aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *available, size_t *total)
{
    (void)attribute;
    *available = *total = DEVICE_BYTES;
    return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t *pid)
{
    *pid = getpid();
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer)
{
    *can = device != peer;
    return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value)
{
    (void)option;
    *value = 0;
    return ACL_SUCCESS;
}
