// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <algorithm>
#include <numeric>

#include "axis.h"
#include "call.h"

namespace emulated {

aclTensor narrowed(aclTensor tensor, int64_t dim, int64_t start, int64_t size)
{
    tensor.first += start * tensor.strides[static_cast<size_t>(dim)] * static_cast<int64_t>(element_bytes(tensor.type));
    tensor.sizes[static_cast<size_t>(dim)] = size;
    return tensor;
}

aclTensor selected(aclTensor tensor, int64_t dim, int64_t k)
{
    tensor = narrowed(tensor, dim, k, 1);
    tensor.sizes.erase(tensor.sizes.begin() + dim);
    tensor.strides.erase(tensor.strides.begin() + dim);
    return tensor;
}

void fill(const aclTensor &out, double number, int64_t integer)
{
    const size_t elements = static_cast<size_t>(count(out.sizes));
    if (is_floating(out.type)) {
        write(out, Array<double>(elements, number));
    } else {
        write(out, Array<int64_t>(elements, integer));
    }
}

void copy(const aclTensor &from, const aclTensor &to)
{
    with_wide(is_floating(from.type), [&](auto wide) { write(to, read<decltype(wide)>(from, to.sizes)); });
}

void take(const char *name, const aclTensor &self, int64_t dim, const aclTensor &index, const aclTensor &out)
{
    with_wide(is_floating(self.type), [&](auto wide) {
        const Axis from(self.sizes, dim);
        const auto x = read<decltype(wide)>(self);
        const auto chosen = read<int64_t>(index);
        Array<decltype(wide)> values;
        values.reserve(static_cast<size_t>(count(out.sizes)));
        for (int64_t i = 0; i < from.before; i++) {
            for (int64_t row : chosen) {
                const auto first = x.begin() + static_cast<int64_t>(from.place(i, inside(name, row, from.size), 0));
                values.insert(values.end(), first, first + from.after);
            }
        }
        write(out, values);
    });
}

void sort(const aclTensor &self, int64_t dim, bool descending, bool stable, const aclTensor &values,
          const aclTensor &places)
{
    with_wide(is_floating(self.type), [&](auto wide) {
        const auto x = read<decltype(wide)>(self);
        const Axis from(self.sizes, dim), to(values.sizes, dim);
        Array<decltype(wide)> found(static_cast<size_t>(count(values.sizes)));
        Array<int64_t> where(found.size()), order(static_cast<size_t>(from.size));
        from.lines([&](int64_t i, int64_t j) {
            std::iota(order.begin(), order.end(), 0);
            if (!stable) {
                std::reverse(order.begin(), order.end());
            }
            std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { // NaN counts as the largest
                const auto p = x[from.place(i, a, j)], q = x[from.place(i, b, j)];
                return descending ? p > q || (p != p && q == q) : p < q || (p == p && q != q);
            });
            for (int64_t k = 0; k < to.size; k++) {
                where[to.place(i, k, j)] = order[static_cast<size_t>(k)];
                found[to.place(i, k, j)] = x[from.place(i, order[static_cast<size_t>(k)], j)];
            }
        });
        write(values, found);
        write(places, where);
    });
}

void running_sum(const aclTensor &self, int64_t dim, bool exclusive, bool reverse, const aclTensor &out)
{
    with_wide(is_floating(out.type), [&](auto wide) {
        auto x = read<decltype(wide)>(self);
        const Axis axis(self.sizes, dim);
        axis.lines([&](int64_t i, int64_t j) {
            decltype(wide) total = 0;
            for (int64_t k = 0; k < axis.size; k++) {
                auto &element = x[axis.place(i, reverse ? axis.size - 1 - k : k, j)];
                const auto before = total;
                total += element;
                element = exclusive ? before : total;
            }
        });
        write(out, x);
    });
}

} // namespace emulated
