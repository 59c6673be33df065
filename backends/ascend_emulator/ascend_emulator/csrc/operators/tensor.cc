// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <functional>
#include <numeric>

#include "elements.h"

namespace emulated {

int64_t count(const Dims &sizes)
{
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

// Call run(address, stride in bytes, length) for each row of the tensor, broadcast to *sizes*, in row-major order.
template <class Run> void each_row(const aclTensor &tensor, const Dims &sizes, Run run)
{
    if (count(sizes) == 0) {
        return;
    }
    const int64_t bytes = static_cast<int64_t>(element_bytes(tensor.type));
    const size_t dims = sizes.size(), lead = dims - tensor.sizes.size();
    Dims strides(dims, 0), index(dims, 0);
    for (size_t dim = lead; dim < dims; dim++) {
        strides[dim] = tensor.sizes[dim - lead] == 1 ? 0 : tensor.strides[dim - lead] * bytes;
    }
    const int64_t length = dims == 0 ? 1 : sizes.back(), step = dims == 0 ? 0 : strides.back();
    char *place = tensor.first;
    for (;;) {
        run(place, step, length);
        int64_t dim = static_cast<int64_t>(dims) - 2;
        for (; dim >= 0 && ++index[dim] == sizes[dim]; dim--) {
            place -= strides[dim] * (sizes[dim] - 1);
            index[dim] = 0;
        }
        if (dim < 0) {
            return;
        }
        place += strides[dim];
    }
}

template <class W> Array<W> read(const aclTensor &tensor, const Dims &sizes)
{
    Array<W> values(static_cast<size_t>(count(sizes)));
    W *next = values.data();
    with_element(tensor.type, [&](auto element) {
        each_row(tensor, sizes, [&](const char *place, int64_t step, int64_t length) {
            for (int64_t k = 0; k < length; k++) {
                *next++ = element.template load<W>(place + k * step);
            }
        });
    });
    return values;
}

template <class W> void write(const aclTensor &tensor, const Array<W> &values)
{
    const W *next = values.data();
    with_element(tensor.type, [&](auto element) {
        each_row(tensor, tensor.sizes, [&](char *place, int64_t step, int64_t length) {
            for (int64_t k = 0; k < length; k++) {
                element.store(place + k * step, *next++);
            }
        });
    });
}

template Array<int64_t> read(const aclTensor &, const Dims &);
template Array<double> read(const aclTensor &, const Dims &);
template Array<float> read(const aclTensor &, const Dims &);
template void write(const aclTensor &, const Array<int64_t> &);
template void write(const aclTensor &, const Array<double> &);
template void write(const aclTensor &, const Array<float> &);

} // namespace emulated
