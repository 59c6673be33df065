// SPDX-License-Identifier: Apache-2.0
// A dense array seen along one dim: [before, size, after].
#ifndef NPU_EMULATOR_AXIS_H
#define NPU_EMULATOR_AXIS_H
#include "tensor.h"

namespace emulated {

struct Axis {
    int64_t before, size, after;

    Axis(const Dims &sizes, int64_t dim) : before(1), size(sizes.empty() ? 1 : sizes[static_cast<size_t>(dim)]), after(1)
    {
        for (int64_t other = 0; other < static_cast<int64_t>(sizes.size()); other++) {
            (other < dim ? before : after) *= other == dim ? 1 : sizes[static_cast<size_t>(other)];
        }
    }

    // Place of element k of the line (i, j), 0 <= i < before, 0 <= j < after.
    size_t place(int64_t i, int64_t k, int64_t j) const { return static_cast<size_t>((i * size + k) * after + j); }

    // use(i, j) for every line.
    template <class Use> void lines(Use use) const
    {
        for (int64_t i = 0; i < before; i++) {
            for (int64_t j = 0; j < after; j++) {
                use(i, j);
            }
        }
    }
};

} // namespace emulated
#endif
