// SPDX-License-Identifier: Apache-2.0
// Operators that move elements, or make them, and compute nothing.
#include "axis.h"
#include "call.h"
#include "kernels.h"

using namespace emulated;

OPERATOR(aclnnInplaceCopy, (const aclTensor *self, const aclTensor *source), {
    call.check("selfRef", *self, ALL);
    call.check("src", *source, ALL);
    call.broadcasts("src", *source, *self);
    return [self = *self, source = *source] { copy(source, self); };
})

OPERATOR(aclnnInplaceZero, (const aclTensor *self), {
    call.check("selfRef", *self, ALL);
    return [self = *self] { fill(self, 0, 0); };
})

OPERATOR(aclnnInplaceOne, (const aclTensor *self), {
    call.check("selfRef", *self, ALL);
    return [self = *self] { fill(self, 1, 1); };
})

OPERATOR(aclnnInplaceFillScalar, (const aclTensor *self, const aclScalar *value), {
    call.check("selfRef", *self, ALL);
    call.check("value", value->type, ALL);
    const int64_t integer = is_floating(value->type) ? static_cast<int64_t>(value->number) : value->integer;
    return [self = *self, number = value->number, integer] { fill(self, number, integer); };
})

OPERATOR(aclnnArange, (const aclScalar *start, const aclScalar *end, const aclScalar *step, const aclTensor *out), {
    call.check("out", *out, FLOATS_AND_DOUBLE | INDICES);
    call.require(step->number != 0 && (end->number - start->number) * step->number >= 0,
                 "from " + std::to_string(start->number) + " to " + std::to_string(end->number) + " by steps of " +
                     std::to_string(step->number));
    return [start = *start, step = *step, out = *out] {
        if (is_floating(out.type)) {
            evenly_spaced(start.number, step.number, out);
        } else {
            evenly_spaced(start.integer, step.integer, out);
        }
    };
})

OPERATOR(aclnnCat, (const aclTensorList *tensors, int64_t dim, const aclTensor *out), {
    dim = call.dim(dim, *out);
    call.check("out", *out, ALL);
    Dims joined = out->sizes;
    joined[static_cast<size_t>(dim)] = 0;
    std::vector<aclTensor> parts;
    for (const aclTensor *tensor : tensors->tensors) {
        call.check("tensors", *tensor, ALL);
        if (tensor->sizes.size() == 1 && tensor->sizes[0] == 0) {
            continue; // a tensor of no elements and one dim is left out, whatever the others are
        }
        call.require(tensor->sizes.size() == joined.size(), "tensors of different numbers of dims");
        joined[static_cast<size_t>(dim)] += tensor->sizes[static_cast<size_t>(dim)];
        parts.push_back(*tensor);
    }
    call.require(joined == out->sizes, "the tensors make up " + text_of(joined) + ", out is " + text_of(out->sizes));
    return [parts, dim, out = *out] {
        int64_t start = 0;
        for (const aclTensor &part : parts) {
            const int64_t size = part.sizes[static_cast<size_t>(dim)];
            copy(part, narrowed(out, dim, start, size));
            start += size;
        }
    };
})

OPERATOR(aclnnStack, (const aclTensorList *tensors, int64_t dim, const aclTensor *out), {
    dim = call.dim(dim, *out);
    call.check("out", *out, ALL);
    std::vector<aclTensor> parts;
    Dims sizes = out->sizes;
    sizes.erase(sizes.begin() + dim);
    for (const aclTensor *tensor : tensors->tensors) {
        call.check("tensors", *tensor, ALL);
        call.require(tensor->sizes == sizes, "a tensor of " + text_of(tensor->sizes) + " in " + text_of(out->sizes));
        parts.push_back(*tensor);
    }
    call.require(static_cast<int64_t>(parts.size()) == out->sizes[static_cast<size_t>(dim)],
                 std::to_string(parts.size()) + " tensors in " + text_of(out->sizes));
    return [parts, dim, out = *out] {
        for (size_t k = 0; k < parts.size(); k++) {
            copy(parts[k], selected(out, dim, static_cast<int64_t>(k)));
        }
    };
})

OPERATOR(aclnnFlip, (const aclTensor *self, const aclIntArray *dims, const aclTensor *out), {
    call.check("self", *self, ALL);
    call.require(out->sizes == self->sizes, "out is " + text_of(out->sizes) + ", self is " + text_of(self->sizes));
    aclTensor view = *self; // from the last element, backwards
    for (int64_t given : dims->values) {
        const size_t dim = static_cast<size_t>(call.dim(given, *self));
        view.first += (view.sizes[dim] - 1) * view.strides[dim] * static_cast<int64_t>(element_bytes(view.type));
        view.strides[dim] = -view.strides[dim];
    }
    return [view, out = *out] { copy(view, out); };
})

OPERATOR(aclnnIndexSelect, (const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *out), {
    call.check("self", *self, ALL);
    call.check("index", *index, INDICES);
    call.require(out->type == self->type, "out is " + name_of(out->type) + ", self is " + name_of(self->type));
    dim = call.dim(dim, *self);
    return [name = call.name, self = *self, dim, index = *index, out = *out] { take(name, self, dim, index, out); };
})

OPERATOR(aclnnGather, (const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *out), {
    call.check("self", *self, ALL);
    call.check("index", *index, INDICES);
    call.require(index->sizes == out->sizes && out->type == self->type,
                 "index is " + text_of(index->sizes) + ", out is " + text_of(out->sizes) + " " + name_of(out->type));
    call.require(index->sizes.size() == self->sizes.size(), "index and self have different numbers of dims");
    dim = call.dim(dim, *self);
    for (size_t other = 0; other < self->sizes.size(); other++) {
        call.require(static_cast<int64_t>(other) == dim || index->sizes[other] <= self->sizes[other],
                     "index is " + text_of(index->sizes) + ", self is " + text_of(self->sizes));
    }
    // The part of self that the index looks at has the index's sizes but for dim.
    aclTensor part = *self;
    part.sizes = index->sizes;
    part.sizes[static_cast<size_t>(dim)] = self->sizes[static_cast<size_t>(dim)];
    return [name = call.name, part, dim, index = *index, out = *out] {
        with_wide(is_floating(part.type), [&](auto wide) {
            const Axis from(part.sizes, dim), to(out.sizes, dim);
            const auto x = read<decltype(wide)>(part);
            const auto chosen = read<int64_t>(index);
            Array<decltype(wide)> values(chosen.size());
            to.lines([&](int64_t i, int64_t j) {
                for (int64_t k = 0; k < to.size; k++) {
                    const size_t place = to.place(i, k, j);
                    values[place] = x[from.place(i, inside(name, chosen[place], from.size), j)];
                }
            });
            write(out, values);
        });
    };
})

OPERATOR(aclnnRepeat, (const aclTensor *self, const aclIntArray *repeats, const aclTensor *out), {
    call.check("self", *self, ALL);
    const size_t dims = repeats->values.size();
    call.require(dims >= self->sizes.size() && dims == out->sizes.size(), "one number of repeats for each dim of out");
    Dims sizes(dims - self->sizes.size(), 1), strides(dims - self->sizes.size(), 0);
    sizes.insert(sizes.end(), self->sizes.begin(), self->sizes.end());
    strides.insert(strides.end(), self->strides.begin(), self->strides.end());
    // As a view of two dims for each: the repeats, which stand still, and what is repeated.
    Dims paired_sizes, paired_strides;
    for (size_t dim = 0; dim < dims; dim++) {
        call.require(repeats->values[dim] * sizes[dim] == out->sizes[dim], "out is " + text_of(out->sizes));
        paired_sizes.insert(paired_sizes.end(), {repeats->values[dim], sizes[dim]});
        paired_strides.insert(paired_strides.end(), {0, strides[dim]});
    }
    return [view = aclTensor{paired_sizes, paired_strides, self->type, self->first}, out = *out] {
        with_wide(is_floating(out.type), [&](auto wide) { write(out, read<decltype(wide)>(view)); });
    };
})

// The padding is given as before and after, of the last dim first, as in torch.nn.functional.pad.
OPERATOR(aclnnConstantPadNd, (const aclTensor *self, const aclIntArray *padding, const aclScalar *value,
                              const aclTensor *out), {
    call.check("self", *self, ALL);
    const size_t dims = out->sizes.size();
    aclTensor inner = *out; // the part of out where self goes
    for (size_t dim = 0; dim < dims; dim++) {
        const size_t pair = 2 * (dims - 1 - dim);
        const int64_t before = pair < padding->values.size() ? padding->values[pair] : 0;
        const int64_t after = pair + 1 < padding->values.size() ? padding->values[pair + 1] : 0;
        call.require(before >= 0 && after >= 0 && before + self->sizes[dim] + after == out->sizes[dim],
                     "padding of " + text_of(self->sizes) + " to " + text_of(out->sizes) + "; it may not be negative");
        inner = narrowed(inner, static_cast<int64_t>(dim), before, self->sizes[dim]);
    }
    return [self = *self, inner, value = *value, out = *out] {
        fill(out, value.number, value.integer);
        copy(self, inner);
    };
})
