// SPDX-License-Identifier: Apache-2.0
// Operators that add elements up where an index says. They add in the order of the index, so that results are the same
// each time; on hardware the order of atomic additions is nobody's.
#include "axis.h"
#include "call.h"

using namespace emulated;

OPERATOR(aclnnEmbeddingDenseBackward, (const aclTensor *gradient, const aclTensor *indices, uint64_t weights,
                                       uint64_t padding, bool by_frequency, const aclTensor *out), {
    call.check("grad", *gradient, FLOATS);
    call.check("indices", *indices, ALL & ~only(ACL_BF16));
    call.check("out", *out, FLOATS);
    call.require(!by_frequency, "scaleGradByFreq is not emulated");
    call.require(out->sizes.size() == 2 && out->sizes[0] == static_cast<int64_t>(weights), "out is " + text_of(out->sizes));
    return [name = call.name, gradient = *gradient, indices = *indices, padding, out = *out] {
        const auto g = read<double>(gradient);
        const auto chosen = read<int64_t>(indices);
        const int64_t width = out.sizes[1];
        Array<double> totals(static_cast<size_t>(count(out.sizes)));
        for (size_t row = 0; row < chosen.size(); row++) {
            const int64_t place = inside(name, chosen[row], out.sizes[0]);
            for (int64_t k = 0; k < width && static_cast<uint64_t>(place) != padding; k++) {
                totals[static_cast<size_t>(place * width + k)] += g[row * static_cast<size_t>(width) + static_cast<size_t>(k)];
            }
        }
        write(out, totals);
    };
})

OPERATOR(aclnnScatterAdd, (const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source,
                           const aclTensor *out), {
    call.check("self", *self, ALL);
    call.check("index", *index, INDICES);
    call.require(self->type == source->type && self->type == out->type, "self, src and out have one type");
    call.require(index->sizes.size() == self->sizes.size(), "index and self have different numbers of dims");
    dim = call.dim(dim, *self);
    return [name = call.name, self = *self, dim, index = *index, source = *source, out = *out] {
        with_wide(is_floating(self.type), [&](auto wide) {
            auto totals = read<decltype(wide)>(self);
            const auto chosen = read<int64_t>(index);
            aclTensor used = source; // the part of the source that has an index
            used.sizes = index.sizes;
            const auto x = read<decltype(wide)>(used);
            Dims at(self.sizes.size(), 0);
            for (size_t k = 0; k < chosen.size(); k++) {
                int64_t rest = static_cast<int64_t>(k), place = 0, step = 1;
                for (size_t d = self.sizes.size(); d-- > 0;) {
                    at[d] = rest % index.sizes[d];
                    rest /= index.sizes[d];
                }
                at[static_cast<size_t>(dim)] = inside(name, chosen[k], self.sizes[static_cast<size_t>(dim)]);
                for (size_t d = self.sizes.size(); d-- > 0;) {
                    place += at[d] * step;
                    step *= self.sizes[d];
                }
                totals[static_cast<size_t>(place)] += x[k];
            }
            write(out, totals);
        });
    };
})

OPERATOR(aclnnIndexAdd, (const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source,
                         const aclScalar *alpha, const aclTensor *out), {
    call.check("self", *self, ALL);
    call.check("index", *index, INDICES);
    call.check("source", *source, ALL);
    dim = call.dim(dim, *self);
    return [name = call.name, self = *self, dim, index = *index, source = *source, alpha = *alpha, out = *out] {
        with_wide(is_floating(self.type), [&](auto wide) {
            using W = decltype(wide);
            const W factor = std::is_same<W, int64_t>::value ? static_cast<W>(alpha.integer) : static_cast<W>(alpha.number);
            auto totals = read<W>(self);
            const auto chosen = read<int64_t>(index);
            const auto x = read<W>(source);
            const Axis to(self.sizes, dim), from(source.sizes, dim);
            from.lines([&](int64_t i, int64_t j) {
                for (int64_t k = 0; k < from.size; k++) {
                    const int64_t row = inside(name, chosen[static_cast<size_t>(k)], to.size);
                    totals[to.place(i, row, j)] += factor * x[from.place(i, k, j)];
                }
            });
            write(out, totals);
        });
    };
})
