// SPDX-License-Identifier: Apache-2.0
// Element types: their names, sizes, and sets of them, in which the tables of CANN's documentation are written down.
#ifndef NPU_EMULATOR_TYPES_H
#define NPU_EMULATOR_TYPES_H
#include <cstdint>
#include <string>

#include "acl/acl_base.h"

namespace emulated {

// A set of element types: bit n is the type of number n.
using Types = uint64_t;

constexpr Types only(aclDataType type)
{
    return Types{1} << type;
}

constexpr Types FLOATS = only(ACL_FLOAT16) | only(ACL_BF16) | only(ACL_FLOAT);
constexpr Types FLOATS_AND_DOUBLE = FLOATS | only(ACL_DOUBLE);
constexpr Types INTEGERS = only(ACL_INT8) | only(ACL_UINT8) | only(ACL_INT16) | only(ACL_INT32) | only(ACL_INT64);
constexpr Types BOOLEAN = only(ACL_BOOL);
constexpr Types ALL = FLOATS_AND_DOUBLE | INTEGERS | BOOLEAN; // that are emulated; none is complex
constexpr Types INDICES = only(ACL_INT32) | only(ACL_INT64);

constexpr bool contains(Types types, aclDataType type)
{
    return type >= 0 && type < 64 && (types >> type & 1) != 0;
}

constexpr bool is_floating(aclDataType type)
{
    return contains(FLOATS_AND_DOUBLE, type);
}

// As CANN's documentation writes them.
std::string name_of(aclDataType type);
std::string names_of(Types types);

// Bytes of an element; 0 for a type that is not emulated.
size_t element_bytes(aclDataType type);

} // namespace emulated
#endif
