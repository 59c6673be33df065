// SPDX-License-Identifier: Apache-2.0
// CANN's older interface to operators: by the name of a type, with descriptions of dense tensors, buffers and attributes.
// MindSpore uses it for what its own interface has no operator of the newer kind for.
#ifndef NPU_EMULATOR_DESCRIPTION_H
#define NPU_EMULATOR_DESCRIPTION_H
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "acl/acl_op.h"
#include "tensor.h"

struct aclTensorDesc {
    aclDataType type;
    aclFormat format;
    emulated::Dims sizes;
    std::string name;
    std::shared_ptr<std::vector<char>> constant; // the values, where they are known on the host
};

struct aclDataBuffer {
    void *address;
    size_t bytes;
};

struct aclopAttr {
    std::map<std::string, int64_t> integers;
    std::map<std::string, double> numbers;
};

#endif
