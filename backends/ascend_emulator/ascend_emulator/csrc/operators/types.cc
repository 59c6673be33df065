// SPDX-License-Identifier: Apache-2.0
#include "types.h"

namespace emulated {

std::string name_of(aclDataType type)
{
    switch (type) {
    case ACL_FLOAT: return "FLOAT";
    case ACL_FLOAT16: return "FLOAT16";
    case ACL_BF16: return "BFLOAT16";
    case ACL_DOUBLE: return "DOUBLE";
    case ACL_INT8: return "INT8";
    case ACL_UINT8: return "UINT8";
    case ACL_INT16: return "INT16";
    case ACL_UINT16: return "UINT16";
    case ACL_INT32: return "INT32";
    case ACL_UINT32: return "UINT32";
    case ACL_INT64: return "INT64";
    case ACL_UINT64: return "UINT64";
    case ACL_BOOL: return "BOOL";
    case ACL_COMPLEX64: return "COMPLEX64";
    case ACL_COMPLEX128: return "COMPLEX128";
    default: return "data type " + std::to_string(static_cast<int>(type));
    }
}

std::string names_of(Types types)
{
    std::string text;
    for (int number = 0; number < 64; number++) {
        if (contains(types, static_cast<aclDataType>(number))) {
            text += (text.empty() ? "" : ", ") + name_of(static_cast<aclDataType>(number));
        }
    }
    return text;
}

size_t element_bytes(aclDataType type)
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
        return 0;
    }
}

} // namespace emulated
