// SPDX-License-Identifier: Apache-2.0
// Products of matrices. Like the device's cube unit they add up in float, in one order.
#include <algorithm>

#include "call.h"

using namespace emulated;

namespace {

// out [M, N] = a [M, K] b [K, N], all dense.
void multiply(const float *__restrict a, const float *__restrict b, float *__restrict out, int64_t m, int64_t k, int64_t n)
{
    std::fill_n(out, m * n, 0.0f);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t l = 0; l < k; l++) {
            const float factor = a[i * k + l];
            for (int64_t j = 0; j < n; j++) {
                out[i * n + j] += factor * b[l * n + j];
            }
        }
    }
}

// A tensor of one dim as a matrix of one row or one column.
aclTensor as_matrix(const aclTensor &tensor, bool column)
{
    aclTensor made = tensor;
    if (tensor.sizes.size() == 1) {
        const int64_t place = column ? 1 : 0;
        made.sizes.insert(made.sizes.begin() + place, 1);
        made.strides.insert(made.strides.begin() + place, 0);
    }
    return made;
}

Kernel product(const Call &call, const aclTensor &self, const aclTensor &other, const aclTensor &out)
{
    call.check("self", self, FLOATS);
    call.check("mat2", other, FLOATS);
    call.check("out", out, FLOATS);
    call.require(self.type == other.type || (self.type != ACL_BF16 && other.type != ACL_BF16),
                 std::string("CANN's page ") + call.name + ".md excludes " + name_of(self.type) + " with " +
                     name_of(other.type) + " on Atlas A2");
    call.require(!self.sizes.empty() && !other.sizes.empty() && self.sizes.size() <= 6 && other.sizes.size() <= 6,
                 "factors have 1 to 6 dims, got " + text_of(self.sizes) + " and " + text_of(other.sizes));
    const aclTensor a = as_matrix(self, false), b = as_matrix(other, true);
    const size_t batch = std::max(a.sizes.size(), b.sizes.size()) - 2;
    const int64_t m = a.sizes[a.sizes.size() - 2], k = a.sizes.back(), n = b.sizes.back();
    call.require(k == b.sizes[b.sizes.size() - 2],
                 "the inner dims of " + text_of(self.sizes) + " and " + text_of(other.sizes) + " differ");
    Dims a_sizes, b_sizes; // with the dims of the batch, broadcast
    int64_t batches = 1;
    for (size_t dim = 0; dim < batch; dim++) {
        const size_t a_lead = batch + 2 - a.sizes.size(), b_lead = batch + 2 - b.sizes.size();
        const int64_t x = dim < a_lead ? 1 : a.sizes[dim - a_lead], y = dim < b_lead ? 1 : b.sizes[dim - b_lead];
        call.require(x == y || x == 1 || y == 1,
                     "batches of " + text_of(self.sizes) + " and " + text_of(other.sizes) + " do not fit together");
        a_sizes.push_back(x == 1 ? y : x);
        batches *= a_sizes.back();
    }
    b_sizes = a_sizes;
    a_sizes.insert(a_sizes.end(), {m, k});
    b_sizes.insert(b_sizes.end(), {k, n});
    call.require(batches * m * n == count(out.sizes), "out is " + text_of(out.sizes));
    return [=] {
        const auto x = read<float>(a, a_sizes), y = read<float>(b, b_sizes);
        Array<float> values(static_cast<size_t>(batches * m * n));
        for (int64_t i = 0; i < batches; i++) {
            multiply(x.data() + i * m * k, y.data() + i * k * n, values.data() + i * m * n, m, k, n);
        }
        write(out, values);
    };
}

} // namespace

#define PRODUCT(NAME)                                                                                                  \
    OPERATOR(NAME, (const aclTensor *self, const aclTensor *other, const aclTensor *out,                               \
                    [[maybe_unused]] int8_t cube_math_type),                                                           \
             { return product(call, *self, *other, *out); })

PRODUCT(aclnnMatmul)
PRODUCT(aclnnMm)
PRODUCT(aclnnBatchMatMul)
