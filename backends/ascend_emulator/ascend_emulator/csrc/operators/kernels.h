// SPDX-License-Identifier: Apache-2.0
// Kernels that operators of both interfaces are made of. They run at once: whoever calls them is in the stream already.
#ifndef NPU_EMULATOR_KERNELS_H
#define NPU_EMULATOR_KERNELS_H
#include "tensor.h"

namespace emulated {

// Views: element k of a dim, without that dim; and a part of a dim.
aclTensor selected(aclTensor tensor, int64_t dim, int64_t k);
aclTensor narrowed(aclTensor tensor, int64_t dim, int64_t start, int64_t size);

void fill(const aclTensor &out, double number, int64_t integer);

// first, first + step, ..., as many as *out* has room for. W is int64_t or double.
template <class W> void evenly_spaced(W first, W step, const aclTensor &out)
{
    Array<W> values(static_cast<size_t>(count(out.sizes)));
    for (size_t k = 0; k < values.size(); k++) {
        values[k] = first + static_cast<W>(k) * step;
    }
    write(out, values);
}

// to = from, broadcast, as to's type.
void copy(const aclTensor &from, const aclTensor &to);

// out = the slices of *self* along *dim* that *index* names, an index of any number of dims.
void take(const char *name, const aclTensor &self, int64_t dim, const aclTensor &index, const aclTensor &out);

// The first of each line in order, as many as *values* has room for, and their places. With *stable* equals stay in
// order; without it the last of equals comes first, so that a program that counts on more than it asked for is seen.
void sort(const aclTensor &self, int64_t dim, bool descending, bool stable, const aclTensor &values,
          const aclTensor &places);

// Running sums along *dim*; of what comes before each element if *exclusive*, from the end if *reverse*.
void running_sum(const aclTensor &self, int64_t dim, bool exclusive, bool reverse, const aclTensor &out);

} // namespace emulated
#endif
