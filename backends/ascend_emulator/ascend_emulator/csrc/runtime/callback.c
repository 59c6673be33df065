/* SPDX-License-Identifier: Apache-2.0 */
/* Callbacks: functions of the host that a stream runs in its turn. On hardware a thread of the program's own runs them,
   when it asks for reports; here it is the stream's thread, and whoever asks for reports finds none. */
#include <stdint.h>
#include <time.h>

#include "acl/acl_rt.h"
#include "emulator.h"

#define LONGEST_WAIT_MS 20 /* so that a thread that polls for reports also sees when it is to end */

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *argument)
{
    npu_enqueue(stream, function, argument, 0);
    return ACL_SUCCESS;
}

aclError aclrtLaunchCallback(aclrtCallback function, void *argument, aclrtCallbackBlockType block, aclrtStream stream)
{
    (void)block; /* the stream's thread cannot go on before the function returns: always as if blocking */
    npu_enqueue(stream, function, argument, 0);
    return ACL_SUCCESS;
}

aclError aclrtSubscribeReport(uint64_t thread, aclrtStream stream)
{
    (void)thread;
    (void)stream;
    return ACL_SUCCESS;
}

aclError aclrtUnSubscribeReport(uint64_t thread, aclrtStream stream)
{
    (void)thread;
    (void)stream;
    return ACL_SUCCESS;
}

aclError aclrtProcessReport(int32_t timeout)
{
    int32_t wait = timeout < 0 || timeout > LONGEST_WAIT_MS ? LONGEST_WAIT_MS : timeout;
    struct timespec pause = {0, (long)wait * 1000000};
    nanosleep(&pause, NULL);
    return ACL_ERROR_RT_REPORT_TIMEOUT;
}
