// SPDX-License-Identifier: Apache-2.0
// Operators that sort and search.
#include <algorithm>
#include <cstdio>

#include "call.h"
#include "emulator.h"
#include "kernels.h"

using namespace emulated;

OPERATOR(aclnnSort, (const aclTensor *self, bool stable, int64_t dim, bool descending, const aclTensor *values,
                     const aclTensor *indices), {
    call.check("self", *self, FLOATS | INTEGERS | BOOLEAN);
    call.check("indicesOut", *indices, only(ACL_INT64));
    if (npu_tells_slow() && !contains(FLOATS, self->type)) { // CANN's sort.cpp lists these for the AI Core of Atlas A2
        std::fprintf(stderr, "emulated NPU: slow: aclnnSort of %s runs on the AI CPU\n", name_of(self->type).c_str());
    }
    return [=, dim = call.dim(dim, *self), self = *self, values = *values, indices = *indices] {
        sort(self, dim, descending, stable, values, indices);
    };
})

OPERATOR(aclnnTopk, (const aclTensor *self, int64_t k, int64_t dim, bool largest, [[maybe_unused]] bool in_order,
                     const aclTensor *values, const aclTensor *indices), {
    call.check("self", *self, FLOATS_AND_DOUBLE | INTEGERS);
    call.check("indicesOut", *indices, only(ACL_INT64));
    dim = call.dim(dim, *self);
    const int64_t size = self->sizes.empty() ? 1 : self->sizes[static_cast<size_t>(dim)];
    call.require(k >= 0 && k <= size, "k is " + std::to_string(k) + " of " + std::to_string(size));
    return [=, self = *self, values = *values, indices = *indices] { sort(self, dim, largest, false, values, indices); };
})

// For each element of *self* how many of the sorted sequence, of the same line, come before it.
OPERATOR(aclnnSearchSorted, (const aclTensor *sequence, const aclTensor *self, [[maybe_unused]] bool as_int32, bool right,
                             const aclTensor *sorter, const aclTensor *out), {
    const Types types = only(ACL_FLOAT) | only(ACL_FLOAT16) | only(ACL_DOUBLE) | INTEGERS;
    call.check("sortedSequence", *sequence, types);
    call.check("self", *self, types);
    call.check("out", *out, INDICES);
    call.require(sorter == nullptr, "a sorter is not emulated");
    call.require(sequence->sizes.size() == 1 || sequence->sizes.size() == self->sizes.size(),
                 "one sorted sequence for all, or one for each line");
    return [sequence = *sequence, self = *self, right, out = *out] {
        with_wide(is_floating(sequence.type) || is_floating(self.type), [&](auto wide) {
            const auto all = read<decltype(wide)>(sequence), x = read<decltype(wide)>(self);
            const int64_t length = sequence.sizes.back();
            const int64_t width = self.sizes.empty() ? 1 : self.sizes.back();
            Array<int64_t> places(x.size());
            for (size_t k = 0; k < x.size(); k++) {
                const int64_t line = sequence.sizes.size() == 1 ? 0 : static_cast<int64_t>(k) / width;
                const auto first = all.begin() + line * length, last = first + length;
                places[k] = (right ? std::upper_bound(first, last, x[k]) : std::lower_bound(first, last, x[k])) - first;
            }
            write(out, places);
        });
    };
})
