// SPDX-License-Identifier: Apache-2.0
// Channels, by which a device sends tensors to the host, for printing and summaries. MindSpore opens some while it
// starts, and a thread of its own waits at them; no operator that is emulated sends anything. C++ because the header is.
#include <cstdlib>
#include <ctime>

#include "acl/acl_tdt.h"

namespace {

constexpr long wait_ns = 20'000'000;
char one_for_all;

} // namespace

acltdtChannelHandle *acltdtCreateChannel(uint32_t, const char *)
{
    return reinterpret_cast<acltdtChannelHandle *>(&one_for_all);
}

acltdtChannelHandle *acltdtCreateChannelWithCapacity(uint32_t, const char *, size_t)
{
    return reinterpret_cast<acltdtChannelHandle *>(&one_for_all);
}

aclError acltdtStopChannel(acltdtChannelHandle *)
{
    return ACL_SUCCESS;
}

aclError acltdtDestroyChannel(acltdtChannelHandle *)
{
    return ACL_SUCCESS;
}

aclError acltdtQueryChannelSize(const acltdtChannelHandle *, size_t *size)
{
    *size = 0;
    return ACL_SUCCESS;
}

aclError acltdtReceiveTensor(const acltdtChannelHandle *, acltdtDataset *, int32_t)
{
    timespec pause{0, wait_ns};
    nanosleep(&pause, nullptr);
    return ACL_ERROR_RT_QUEUE_EMPTY;
}

acltdtDataset *acltdtCreateDataset()
{
    return static_cast<acltdtDataset *>(std::calloc(1, 1));
}

aclError acltdtDestroyDataset(acltdtDataset *dataset)
{
    std::free(dataset);
    return ACL_SUCCESS;
}
