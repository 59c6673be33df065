// SPDX-License-Identifier: Apache-2.0
// How an operator of CANN is called, in two steps: with descriptions of the operands, for an executor; and with the
// executor and a stream, to run.
//
//     OPERATOR(aclnnName, (const aclTensor *self, const aclTensor *out), {
//         call.check("self", *self, FLOATS);            refuse what the page aclnnName.md of CANN does not list
//         return [self = *self, out = *out] { ... };    the kernel, which runs in the stream
//     })
#ifndef NPU_EMULATOR_CALL_H
#define NPU_EMULATOR_CALL_H
#include <functional>
#include <string>

#include "acl/acl_rt.h"
#include "tensor.h"

struct aclOpExecutor {
    std::function<void()> kernel;
};

namespace emulated {

using Kernel = std::function<void()>;

// Why a call is refused; thrown while an operator is described, and told to the caller as CANN tells it.
struct Refusal {
    std::string message;
};

// The call that is being described.
struct Call {
    const char *name;

    // Refuse unless *rule* holds.
    void require(bool rule, const std::string &message) const;
    // Refuse a tensor or scalar of a type that the operator's page does not list for that parameter.
    void check(const char *parameter, aclDataType type, Types types) const;
    void check(const char *parameter, const aclTensor &tensor, Types types) const;
    // Refuse unless *tensor* can be broadcast to the sizes of *out*.
    void broadcasts(const char *parameter, const aclTensor &tensor, const aclTensor &out) const;
    // The dim counted from the front.
    int64_t dim(int64_t given, const aclTensor &tensor) const;
};

aclError describe(const char *name, uint64_t *workspace, aclOpExecutor **executor,
                  const std::function<Kernel(const Call &)> &make);
aclError launch(aclOpExecutor *executor, aclrtStream stream);

// Abort: an index of a kernel that runs lies outside; on hardware the core faults, or reads what is there.
[[noreturn]] void outside(const char *name, int64_t index, int64_t size);

inline int64_t inside(const char *name, int64_t index, int64_t size)
{
    if (index < 0 || index >= size) {
        outside(name, index, size);
    }
    return index;
}

std::string text_of(const Dims &sizes);

} // namespace emulated

#define EMULATED_LIST(...) __VA_ARGS__

#define OPERATOR(NAME, PARAMETERS, ...)                                                                                \
    extern "C" aclError NAME##GetWorkspaceSize(EMULATED_LIST PARAMETERS, uint64_t *workspace,                          \
                                               aclOpExecutor **executor)                                               \
    {                                                                                                                  \
        return emulated::describe(#NAME, workspace, executor,                                                          \
                                  [&]([[maybe_unused]] const emulated::Call &call) -> emulated::Kernel __VA_ARGS__);   \
    }                                                                                                                  \
    extern "C" aclError NAME(void *, uint64_t, aclOpExecutor *executor, aclrtStream stream)                            \
    {                                                                                                                  \
        return emulated::launch(executor, stream);                                                                     \
    }
#endif
