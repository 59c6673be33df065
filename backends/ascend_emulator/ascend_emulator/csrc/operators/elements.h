// SPDX-License-Identifier: Apache-2.0
// How elements of each type lie in memory.
#ifndef NPU_EMULATOR_ELEMENTS_H
#define NPU_EMULATOR_ELEMENTS_H
#include <cstring>

#include "types.h"

namespace emulated {

// load gives the value as a W, store takes one.
template <class T> struct Plain {
    template <class W> static W load(const char *place)
    {
        T value;
        std::memcpy(&value, place, sizeof value);
        return static_cast<W>(value);
    }
    template <class W> static void store(char *place, W wide)
    {
        T value = static_cast<T>(wide);
        std::memcpy(place, &value, sizeof value);
    }
};

struct Boolean {
    template <class W> static W load(const char *place) { return static_cast<W>(*place != 0); }
    template <class W> static void store(char *place, W wide) { *place = wide != 0; }
};

struct Bfloat16 {
    template <class W> static W load(const char *place)
    {
        uint16_t bits;
        std::memcpy(&bits, place, sizeof bits);
        uint32_t widened = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &widened, sizeof value);
        return static_cast<W>(value);
    }
    template <class W> static void store(char *place, W wide) // to the nearest, ties to even; NaN stays NaN
    {
        float value = static_cast<float>(wide);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits = value != value ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
        uint16_t rounded = static_cast<uint16_t>(bits >> 16);
        std::memcpy(place, &rounded, sizeof rounded);
    }
};

// Call use(E()) with the way in which elements of *type* lie in memory.
template <class Use> void with_element(aclDataType type, Use use)
{
    switch (type) {
    case ACL_FLOAT: use(Plain<float>()); break;
    case ACL_DOUBLE: use(Plain<double>()); break;
    case ACL_FLOAT16: use(Plain<_Float16>()); break;
    case ACL_BF16: use(Bfloat16()); break;
    case ACL_INT8: use(Plain<int8_t>()); break;
    case ACL_UINT8: use(Plain<uint8_t>()); break;
    case ACL_INT16: use(Plain<int16_t>()); break;
    case ACL_INT32: use(Plain<int32_t>()); break;
    case ACL_INT64: use(Plain<int64_t>()); break;
    case ACL_BOOL: use(Boolean()); break;
    default: break; // refused before any kernel is made: see Call::check
    }
}

} // namespace emulated
#endif
