// SPDX-License-Identifier: Apache-2.0
// Products of groups: rows with their group's own matrix, or the products of what is contracted group by group.
#include <algorithm>
#include <limits>

#include "call.h"
#include "emulator.h"

using namespace emulated;

namespace {

constexpr int64_t ROWS = 0, CONTRACTED = 2; // groupType
constexpr int64_t MOST_GROUPS = 1024, WIDTH_LIMIT = 65536;

bool absent(const aclTensorList *list)
{
    return list == nullptr || list->tensors.empty();
}

// Whether the last two dims lie in memory the other way round, as CANN's pages define a transposed tensor.
bool is_turned(const aclTensor &tensor)
{
    const size_t last = tensor.sizes.size() - 1;
    return tensor.strides[last - 1] == 1 && tensor.strides[last] == tensor.sizes[last - 1];
}

bool is_dense(const aclTensor &tensor)
{
    int64_t step = 1;
    for (size_t dim = tensor.sizes.size(); dim-- > 0; step *= tensor.sizes[dim]) {
        if (tensor.sizes[dim] != 1 && tensor.strides[dim] != step) {
            return false;
        }
    }
    return true;
}

// Where groups end. On hardware a list that breaks the rules reads and writes what is not there.
Array<int64_t> ends(const char *name, const aclTensor &list, bool sizes, int64_t all)
{
    auto stops = read<int64_t>(list);
    int64_t last = 0;
    for (int64_t &stop : stops) {
        stop += sizes ? last : 0;
        if (stop < last) {
            npu_die("%s: groupList is not ascending: %ld after %ld", name, static_cast<long>(stop),
                    static_cast<long>(last));
        }
        last = stop;
    }
    if (last != all) {
        npu_die("%s: groups of %ld, but there are %ld; its page wants the last number to be that", name,
                static_cast<long>(last), static_cast<long>(all));
    }
    return stops;
}

// out [M, N] += a [M, K] b [K, N]; b and out are dense, and rows of a are *a_row* elements apart.
void add_product(const float *a, int64_t a_row, const float *b, float *out, int64_t m, int64_t k,
                 int64_t n)
{
    for (int64_t i = 0; i < m; i++) {
        for (int64_t l = 0; l < k; l++) {
            const float factor = a[i * a_row + l];
            for (int64_t j = 0; j < n; j++) {
                out[i * n + j] += factor * b[l * n + j];
            }
        }
    }
}

} // namespace

OPERATOR(aclnnGroupedMatmulV4,
         (const aclTensorList *xs, const aclTensorList *weights, const aclTensorList *bias, const aclTensorList *scale,
          const aclTensorList *offset, const aclTensorList *antiquant_scale, const aclTensorList *antiquant_offset,
          const aclTensorList *token_scale, const aclTensor *list, const aclTensorList *activation_input,
          const aclTensorList *activation_scale, const aclTensorList *activation_offset, int64_t split_item,
          int64_t group_type, int64_t list_type, int64_t activation, const aclTensorList *outs,
          const aclTensorList *activation_out, const aclTensorList *scale_out),
         {
    for (const aclTensorList *other : {bias, scale, offset, antiquant_scale, antiquant_offset, token_scale,
                                       activation_input, activation_scale, activation_offset, activation_out, scale_out}) {
        call.require(absent(other), "biases, scales, offsets and activations are not emulated");
    }
    call.require(activation == 0, "activations are not emulated");
    call.require(xs->tensors.size() == 1 && weights->tensors.size() == 1 && outs->tensors.size() == 1,
                 "lists of several tensors are not emulated");
    const aclTensor x = *xs->tensors[0], weight = *weights->tensors[0], out = *outs->tensors[0];
    const std::string page = std::string("CANN's page ") + call.name + ".md ";
    call.check("x", x, FLOATS);
    call.require(x.type == weight.type && x.type == out.type, page + "wants x, weight and out of one type, got " +
                                                                  name_of(x.type) + ", " + name_of(weight.type) +
                                                                  " and " + name_of(out.type));
    call.require(group_type == ROWS || group_type == CONTRACTED,
                 "groupType " + std::to_string(group_type) + " is not emulated, 0 and 2 are");
    call.require(split_item == 2 || split_item == 3, page + "wants splitItem 2 or 3 for a single out");
    call.require(list != nullptr, page + "wants a groupList here");
    call.check("groupListOptional", *list, only(ACL_INT64));
    call.require(list_type == 0 || list_type == 1, "groupListType " + std::to_string(list_type) + " is not emulated");
    const bool by_rows = group_type == ROWS;
    const size_t of_weight = by_rows ? 3 : 2, of_out = by_rows ? 2 : 3;
    call.require(x.sizes.size() == 2 && weight.sizes.size() == of_weight && out.sizes.size() == of_out &&
                     list->sizes.size() == 1,
                 page + "wants other numbers of dims: x " + text_of(x.sizes) + ", weight " + text_of(weight.sizes) +
                     ", out " + text_of(out.sizes) + ", groupList " + text_of(list->sizes));
    const int64_t groups = list->sizes[0];
    call.require(groups <= MOST_GROUPS, page + "takes at most 1024 groups, got " + std::to_string(groups));
    call.require(x.sizes[1] < WIDTH_LIMIT || !by_rows, page + "wants the last dim of x below 65536");
    call.require(x.sizes[0] < WIDTH_LIMIT || by_rows, page + "wants the last dim of a transposed x below 65536");
    call.require(weight.sizes[is_turned(weight) && by_rows ? of_weight - 2 : of_weight - 1] < WIDTH_LIMIT,
                 page + "wants the last dim of weight below 65536");
    call.require(count(x.sizes) > 0 && count(weight.sizes) > 0 && count(out.sizes) > 0,
                 page + "says nothing of empty tensors: x " + text_of(x.sizes) + ", weight " + text_of(weight.sizes));
    call.require(is_dense(out), "out has strides");
    if (by_rows) {
        call.require(is_dense(x), page + "takes no transposed x for groupType 0");
        call.require(is_dense(weight) || (is_turned(weight) && weight.strides[0] == weight.sizes[1] * weight.sizes[2]),
                     page + "takes weight as it lies, or transposed");
        call.require(weight.sizes[0] == groups && weight.sizes[1] == x.sizes[1] &&
                         out.sizes == Dims({x.sizes[0], weight.sizes[2]}),
                     "x " + text_of(x.sizes) + ", weight " + text_of(weight.sizes) + ", out " + text_of(out.sizes) +
                         " and " + std::to_string(groups) + " groups do not fit together");
    } else {
        call.require(is_turned(x), page + "wants a transposed x for groupType 2");
        call.require(is_dense(weight), page + "takes no transposed weight for groupType 2");
        call.require(weight.sizes[0] == x.sizes[1] && out.sizes == Dims({groups, x.sizes[0], weight.sizes[1]}),
                     "x " + text_of(x.sizes) + ", weight " + text_of(weight.sizes) + ", out " + text_of(out.sizes) +
                         " and " + std::to_string(groups) + " groups do not fit together");
    }
    return [=, name = call.name, list = *list] {
        const int64_t grouped = x.sizes[by_rows ? 0 : 1], n = weight.sizes.back();
        const auto stops = ends(name, list, list_type == 1, grouped);
        const auto a = read<float>(x), b = read<float>(weight);
        // What the page leaves undefined, a product of nothing, is NaN: a caller who reads it sees that.
        Array<float> values(static_cast<size_t>(count(out.sizes)), std::numeric_limits<float>::quiet_NaN());
        int64_t start = 0;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t stop = stops[static_cast<size_t>(group)];
            if (stop > start) {
                const int64_t m = by_rows ? stop - start : x.sizes[0], k = by_rows ? x.sizes[1] : stop - start;
                float *to = values.data() + (by_rows ? start : group * m) * n;
                std::fill_n(to, m * n, 0.0f);
                if (by_rows) {
                    add_product(a.data() + start * k, k, b.data() + group * k * n, to, m, k, n);
                } else {
                    add_product(a.data() + start, grouped, b.data() + start * n, to, m, k, n);
                }
            }
            start = stop;
        }
        write(out, values);
    };
})
