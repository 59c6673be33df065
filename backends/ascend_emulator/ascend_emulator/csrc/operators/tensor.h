// SPDX-License-Identifier: Apache-2.0
// Operands, and the way to their elements.
//
// A kernel reads an operand as a dense, row-major array of one of two wide types, int64_t or double, in which every
// element type that is emulated is exact; it computes on such arrays; and it writes one back, rounded once. Strides,
// offsets, broadcasting and element types are dealt with here and nowhere else.
#ifndef NPU_EMULATOR_TENSOR_H
#define NPU_EMULATOR_TENSOR_H
#include <vector>

#include "types.h"

namespace emulated {

using Dims = std::vector<int64_t>;

template <class W> using Array = std::vector<W>;

int64_t count(const Dims &sizes);

} // namespace emulated

// CANN's opaque descriptors. Callers destroy theirs before a kernel runs, so that kernels hold copies.
struct aclTensor {
    emulated::Dims sizes, strides; // strides in elements
    aclDataType type;
    char *first; // element
};

struct aclScalar {
    aclDataType type;
    double number;
    int64_t integer; // the same; exact where the type is an integer
};

struct aclIntArray {
    emulated::Dims values;
};

struct aclFloatArray {
    std::vector<float> values;
};

struct aclBoolArray {
    std::vector<char> values;
};

struct aclTensorList {
    std::vector<aclTensor *> tensors;
};

namespace emulated {

// Call use(W()) with double if *floating*, else with int64_t.
template <class Use> void with_wide(bool floating, Use use)
{
    if (floating) {
        use(double());
    } else {
        use(int64_t());
    }
}

// The elements, broadcast to *sizes*. W is int64_t, double or float.
template <class W> Array<W> read(const aclTensor &tensor, const Dims &sizes);

template <class W> Array<W> read(const aclTensor &tensor)
{
    return read<W>(tensor, tensor.sizes);
}

template <class W> void write(const aclTensor &tensor, const Array<W> &values);

} // namespace emulated
#endif
