// SPDX-License-Identifier: Apache-2.0
#include "call.h"

#include "emulator.h"

#define ACLNN_ERR_PARAM_INVALID 161002
#define MOST_DIMS 8

namespace emulated {

void Call::require(bool rule, const std::string &message) const
{
    if (!rule) {
        throw Refusal{std::string(name) + ": " + message};
    }
}

void Call::check(const char *parameter, aclDataType type, Types types) const
{
    require(contains(types, type), std::string("CANN's page ") + name + ".md does not list " + name_of(type) + " for " +
                                       parameter + " on Atlas A2; of the types that are emulated it lists " +
                                       names_of(types));
}

void Call::check(const char *parameter, const aclTensor &tensor, Types types) const
{
    check(parameter, tensor.type, types);
    require(tensor.sizes.size() <= MOST_DIMS, std::string("CANN's operators take at most 8 dims; ") + parameter +
                                                  " is " + text_of(tensor.sizes));
}

void Call::broadcasts(const char *parameter, const aclTensor &tensor, const aclTensor &out) const
{
    const size_t dims = out.sizes.size(), lead = dims - tensor.sizes.size();
    bool fits = tensor.sizes.size() <= dims;
    for (size_t dim = 0; fits && dim < tensor.sizes.size(); dim++) {
        fits = tensor.sizes[dim] == 1 || tensor.sizes[dim] == out.sizes[dim + lead];
    }
    require(fits, std::string(parameter) + " of sizes " + text_of(tensor.sizes) + " cannot be broadcast to " +
                      text_of(out.sizes));
}

int64_t Call::dim(int64_t given, const aclTensor &tensor) const
{
    const int64_t dims = static_cast<int64_t>(tensor.sizes.size());
    require(given >= -dims && given < dims, "dim " + std::to_string(given) + " of a tensor of " + text_of(tensor.sizes));
    return given < 0 ? given + dims : given;
}

aclError describe(const char *name, uint64_t *workspace, aclOpExecutor **executor,
                  const std::function<Kernel(const Call &)> &make)
{
    try {
        *executor = new aclOpExecutor{make(Call{name})};
    } catch (const Refusal &refusal) {
        return npu_refuse(ACLNN_ERR_PARAM_INVALID, "%s", refusal.message.c_str());
    }
    *workspace = 0;
    return ACL_SUCCESS;
}

static void run(void *argument)
{
    auto *executor = static_cast<aclOpExecutor *>(argument);
    executor->kernel();
    delete executor;
}

aclError launch(aclOpExecutor *executor, aclrtStream stream)
{
    npu_enqueue(stream, run, executor, 0);
    return ACL_SUCCESS;
}

void outside(const char *name, int64_t index, int64_t size)
{
    npu_die("%s: index %ld of a dim of %ld", name, static_cast<long>(index), static_cast<long>(size));
}

std::string text_of(const Dims &sizes)
{
    std::string text = "[";
    for (size_t dim = 0; dim < sizes.size(); dim++) {
        text += (dim == 0 ? "" : ", ") + std::to_string(sizes[dim]);
    }
    return text + "]";
}

} // namespace emulated

extern "C" {

aclError aclnnInit(const char *)
{
    return ACL_SUCCESS;
}

aclError aclnnFinalize()
{
    return ACL_SUCCESS;
}

// An executor is used once: a caller that wants to keep it is told that it cannot, and describes the operator anew.
aclError aclSetAclOpExecutorRepeatable(aclOpExecutor *)
{
    return ACL_ERROR_FEATURE_UNSUPPORTED;
}

aclError aclDestroyAclOpExecutor(aclOpExecutor *executor)
{
    delete executor;
    return ACL_SUCCESS;
}
}
