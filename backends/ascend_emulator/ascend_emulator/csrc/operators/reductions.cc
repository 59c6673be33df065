// SPDX-License-Identifier: Apache-2.0
// Operators along dims: sums, extremes, running sums, softmax and its gradient.
#include <algorithm>
#include <cmath>
#include <limits>

#include "axis.h"
#include "call.h"
#include "kernels.h"

using namespace emulated;

namespace {

// The view of a tensor with *dims* (all, if there are none) last, and how many elements they hold.
struct Reduced {
    aclTensor view;
    int64_t inner;
};

Reduced reduced(const Call &call, const aclTensor &self, const aclIntArray *dims, bool keep, const aclTensor &out)
{
    std::vector<bool> gone(self.sizes.size(), dims == nullptr || dims->values.empty());
    if (dims != nullptr) {
        for (int64_t given : dims->values) {
            gone[static_cast<size_t>(call.dim(given, self))] = true;
        }
    }
    Reduced made{{{}, {}, self.type, self.first}, 1};
    Dims expected;
    for (bool last : {false, true}) {
        for (size_t dim = 0; dim < gone.size(); dim++) {
            if (gone[dim] == last) {
                made.view.sizes.push_back(self.sizes[dim]);
                made.view.strides.push_back(self.strides[dim]);
                made.inner *= last ? self.sizes[dim] : 1;
            }
        }
    }
    for (size_t dim = 0; dim < gone.size(); dim++) {
        if (!gone[dim] || keep) {
            expected.push_back(gone[dim] ? 1 : self.sizes[dim]);
        }
    }
    call.require(count(expected) == count(out.sizes), "out is " + text_of(out.sizes) + ", expected " + text_of(expected));
    return made;
}

// out[i] = total(elements of i), by *add* from *start*.
template <class Add> Kernel reduce(Reduced what, const aclTensor &out, double start, double scale, Add add)
{
    return [=] {
        with_wide(is_floating(what.view.type) || is_floating(out.type), [&](auto wide) {
            using W = decltype(wide);
            const auto x = read<W>(what.view);
            Array<W> totals(static_cast<size_t>(count(out.sizes)));
            for (size_t i = 0; i < totals.size(); i++) {
                W total = std::isinf(start) && std::is_same<W, int64_t>::value
                              ? (start > 0 ? std::numeric_limits<W>::max() : std::numeric_limits<W>::min())
                              : static_cast<W>(start);
                for (int64_t k = 0; k < what.inner; k++) {
                    total = static_cast<W>(add(total, x[i * static_cast<size_t>(what.inner) + static_cast<size_t>(k)]));
                }
                totals[i] = scale == 1 ? total : static_cast<W>(static_cast<double>(total) * scale);
            }
            write(out, totals);
        });
    };
}

template <class Better> Kernel extreme(const Call &call, const aclTensor &self, const aclIntArray *dims, bool keep,
                                       const aclTensor &out, double worst, Better better)
{
    call.check("self", self, ALL);
    call.require(out.type == self.type, "out is " + name_of(out.type) + ", self is " + name_of(self.type));
    const Reduced what = reduced(call, self, dims, keep, out);
    call.require(what.inner > 0 || count(out.sizes) == 0, "the largest or smallest of nothing: " + text_of(self.sizes));
    return reduce(what, out, worst, 1, [better](auto a, auto b) { return b != b || better(b, a) ? b : a; });
}

} // namespace

OPERATOR(aclnnReduceSum, (const aclTensor *self, const aclIntArray *dims, bool keep, [[maybe_unused]] aclDataType type,
                          const aclTensor *out), {
    call.check("self", *self, ALL);
    call.check("out", *out, ALL);
    return reduce(reduced(call, *self, dims, keep, *out), *out, 0, 1, [](auto a, auto b) { return a + b; });
})

OPERATOR(aclnnMean, (const aclTensor *self, const aclIntArray *dims, bool keep, [[maybe_unused]] aclDataType type,
                     const aclTensor *out), {
    call.check("self", *self, ALL & ~BOOLEAN);
    call.check("out", *out, ALL & ~BOOLEAN);
    const Reduced what = reduced(call, *self, dims, keep, *out);
    return reduce(what, *out, 0, 1 / static_cast<double>(what.inner), [](auto a, auto b) { return a + b; });
})

OPERATOR(aclnnAmax, (const aclTensor *self, const aclIntArray *dims, bool keep, const aclTensor *out), {
    return extreme(call, *self, dims, keep, *out, -INFINITY, [](auto a, auto b) { return a > b; });
})

OPERATOR(aclnnAmin, (const aclTensor *self, const aclIntArray *dims, bool keep, const aclTensor *out), {
    return extreme(call, *self, dims, keep, *out, INFINITY, [](auto a, auto b) { return a < b; });
})

OPERATOR(aclnnCumsum, (const aclTensor *self, int64_t dim, aclDataType type, const aclTensor *out), {
    call.check("self", *self, ALL & ~BOOLEAN);
    call.check("out", *out, ALL & ~BOOLEAN);
    call.require(type == out->type, "dtype is " + name_of(type) + ", out is " + name_of(out->type));
    dim = call.dim(dim, *self);
    return [self = *self, dim, out = *out] { running_sum(self, dim, false, false, out); };
})

OPERATOR(aclnnSoftmax, (const aclTensor *self, int64_t dim, const aclTensor *out), {
    call.check("self", *self, FLOATS_AND_DOUBLE);
    call.check("out", *out, FLOATS_AND_DOUBLE);
    dim = call.dim(dim, *self);
    return [self = *self, dim, out = *out] {
        auto x = read<double>(self);
        const Axis axis(self.sizes, dim);
        axis.lines([&](int64_t i, int64_t j) {
            double most = -INFINITY, total = 0;
            for (int64_t k = 0; k < axis.size; k++) {
                most = std::max(most, x[axis.place(i, k, j)]);
            }
            for (int64_t k = 0; k < axis.size; k++) {
                double &value = x[axis.place(i, k, j)];
                value = std::exp(value - most);
                total += value;
            }
            for (int64_t k = 0; k < axis.size; k++) {
                x[axis.place(i, k, j)] /= total;
            }
        });
        write(out, x);
    };
})

OPERATOR(aclnnSoftmaxBackward, (const aclTensor *gradient, const aclTensor *output, int64_t dim, const aclTensor *out), {
    call.check("gradOutput", *gradient, FLOATS);
    call.check("output", *output, FLOATS);
    dim = call.dim(dim, *output);
    return [gradient = *gradient, output = *output, dim, out = *out] {
        auto g = read<double>(gradient, output.sizes);
        const auto y = read<double>(output);
        const Axis axis(output.sizes, dim);
        axis.lines([&](int64_t i, int64_t j) {
            double total = 0;
            for (int64_t k = 0; k < axis.size; k++) {
                total += g[axis.place(i, k, j)] * y[axis.place(i, k, j)];
            }
            for (int64_t k = 0; k < axis.size; k++) {
                double &value = g[axis.place(i, k, j)];
                value = y[axis.place(i, k, j)] * (value - total);
            }
        });
        write(out, g);
    };
})
