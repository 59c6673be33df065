// SPDX-License-Identifier: Apache-2.0
// Elementwise operators, as a table: name, the types that CANN's page of that name lists for inputs and for the output
// on Atlas A2, and the value. Values are computed in double where a floating point number is among the operands, else in
// int64_t, and rounded once.
#include <cmath>

#include "call.h"

using namespace emulated;

namespace {

template <class W> W logistic(W x)
{
    return 1 / (1 + std::exp(-x));
}

int64_t power(int64_t base, int64_t exponent)
{
    int64_t result = 1;
    for (int64_t k = 0; k < exponent; k++) {
        result *= base;
    }
    return result;
}

double power(double base, double exponent)
{
    return std::pow(base, exponent);
}

double floor_divide(double a, double b)
{
    return std::floor(a / b);
}

int64_t floor_divide(int64_t a, int64_t b)
{
    return b == 0 ? 0 : a / b - (a % b != 0 && (a < 0) != (b < 0)); // by zero: whatever the device makes of it
}

// The scalar as one that is combined with elements of *type*: not more precise than float, unless they are.
template <class W> W scalar_beside(const aclScalar &scalar, aclDataType type)
{
    if (std::is_same<W, int64_t>::value) {
        return static_cast<W>(scalar.integer);
    }
    return static_cast<W>(type == ACL_DOUBLE ? scalar.number : static_cast<double>(static_cast<float>(scalar.number)));
}

// out = value(a[, b]), each operand broadcast to out.
template <class Value> Kernel unary(const aclTensor &a, const aclTensor &out, Value value)
{
    return [=] {
        with_wide(is_floating(a.type) || is_floating(out.type), [&](auto wide) {
            auto x = read<decltype(wide)>(a, out.sizes);
            for (auto &element : x) {
                element = static_cast<decltype(wide)>(value(element));
            }
            write(out, x);
        });
    };
}

template <class Value> Kernel binary(const aclTensor &a, const aclTensor &b, const aclTensor &out, Value value)
{
    return [=] {
        with_wide(is_floating(a.type) || is_floating(b.type) || is_floating(out.type), [&](auto wide) {
            auto x = read<decltype(wide)>(a, out.sizes);
            const auto y = read<decltype(wide)>(b, out.sizes);
            for (size_t k = 0; k < x.size(); k++) {
                x[k] = static_cast<decltype(wide)>(value(x[k], y[k]));
            }
            write(out, x);
        });
    };
}

template <class Value> Kernel with_scalar(const aclTensor &a, const aclScalar &b, const aclTensor &out, Value value)
{
    return [=] {
        with_wide(is_floating(a.type) || is_floating(b.type) || is_floating(out.type), [&](auto wide) {
            const auto y = scalar_beside<decltype(wide)>(b, a.type);
            auto x = read<decltype(wide)>(a, out.sizes);
            for (auto &element : x) {
                element = static_cast<decltype(wide)>(value(element, y));
            }
            write(out, x);
        });
    };
}

} // namespace

#define UNARY(NAME, INPUTS, OUTPUT, VALUE)                                                                             \
    OPERATOR(NAME, (const aclTensor *self, const aclTensor *out), {                                                    \
        call.check("self", *self, INPUTS);                                                                             \
        call.check("out", *out, OUTPUT);                                                                               \
        call.broadcasts("self", *self, *out);                                                                          \
        return unary(*self, *out, [](auto x) { return VALUE; });                                                       \
    })

#define BINARY(NAME, INPUTS, OUTPUT, VALUE)                                                                            \
    OPERATOR(NAME, (const aclTensor *self, const aclTensor *other, const aclTensor *out), {                            \
        call.check("self", *self, INPUTS);                                                                             \
        call.check("other", *other, INPUTS);                                                                           \
        call.check("out", *out, OUTPUT);                                                                               \
        call.broadcasts("self", *self, *out);                                                                          \
        call.broadcasts("other", *other, *out);                                                                        \
        return binary(*self, *other, *out, [](auto a, auto b) { return VALUE; });                                      \
    })

#define WITH_SCALAR(NAME, INPUTS, OUTPUT, VALUE)                                                                       \
    OPERATOR(NAME, (const aclTensor *self, const aclScalar *other, const aclTensor *out), {                            \
        call.check("self", *self, INPUTS);                                                                             \
        call.check("other", other->type, INPUTS);                                                                      \
        call.check("out", *out, OUTPUT);                                                                               \
        call.broadcasts("self", *self, *out);                                                                          \
        return with_scalar(*self, *other, *out, [](auto a, auto b) { return VALUE; });                                 \
    })

// Of the two operands the second is multiplied by alpha first.
#define WITH_ALPHA(NAME, SIGN)                                                                                         \
    OPERATOR(NAME, (const aclTensor *self, const aclTensor *other, const aclScalar *alpha, const aclTensor *out), {    \
        call.check("self", *self, ALL);                                                                                \
        call.check("other", *other, ALL);                                                                              \
        call.check("out", *out, ALL);                                                                                  \
        call.broadcasts("self", *self, *out);                                                                          \
        call.broadcasts("other", *other, *out);                                                                        \
        return binary(*self, *other, *out, [k = *alpha, type = other->type](auto a, auto b) {                          \
            return a SIGN scalar_beside<decltype(b)>(k, type) * b;                                                     \
        });                                                                                                            \
    })

#define IN_PLACE_WITH_ALPHA(NAME, SIGN)                                                                                \
    OPERATOR(NAME, (const aclTensor *self, const aclTensor *other, const aclScalar *alpha), {                          \
        call.check("selfRef", *self, ALL);                                                                             \
        call.check("other", *other, ALL);                                                                              \
        call.broadcasts("other", *other, *self);                                                                       \
        return binary(*self, *other, *self, [k = *alpha, type = other->type](auto a, auto b) {                         \
            return a SIGN scalar_beside<decltype(b)>(k, type) * b;                                                     \
        });                                                                                                            \
    })

#define SCALAR_WITH_ALPHA(NAME, SIGN)                                                                                  \
    OPERATOR(NAME, (const aclTensor *self, const aclScalar *other, const aclScalar *alpha, const aclTensor *out), {    \
        call.check("self", *self, ALL);                                                                                \
        call.check("other", other->type, ALL);                                                                         \
        call.check("out", *out, ALL);                                                                                  \
        call.broadcasts("self", *self, *out);                                                                          \
        return with_scalar(*self, *other, *out, [k = *alpha, type = self->type](auto a, auto b) {                      \
            return a SIGN scalar_beside<decltype(b)>(k, type) * b;                                                     \
        });                                                                                                            \
    })

WITH_ALPHA(aclnnAdd, +)
WITH_ALPHA(aclnnSub, -)
IN_PLACE_WITH_ALPHA(aclnnInplaceAdd, +)
IN_PLACE_WITH_ALPHA(aclnnInplaceSub, -)
SCALAR_WITH_ALPHA(aclnnAdds, +)
SCALAR_WITH_ALPHA(aclnnSubs, -)

//     name                    inputs                                 output             value
BINARY(aclnnMul,               ALL,                                   ALL,               a * b)
BINARY(aclnnDiv,               ALL,                                   ALL,               static_cast<double>(a) / static_cast<double>(b))
BINARY(aclnnFloorDivide,       ALL,                                   ALL & ~BOOLEAN,    floor_divide(a, b))
BINARY(aclnnMaximum,           ALL,                                   ALL,               a > b || a != a ? a : b)
BINARY(aclnnMinimum,           ALL,                                   ALL,               a < b || a != a ? a : b)
BINARY(aclnnEqTensor,          ALL,                                   ALL,               a == b)
BINARY(aclnnNeTensor,          ALL,                                   ALL,               a != b)
BINARY(aclnnLtTensor,          ALL,                                   ALL,               a < b)
BINARY(aclnnLeTensor,          ALL,                                   ALL,               a <= b)
BINARY(aclnnGtTensor,          ALL,                                   ALL,               a > b)
BINARY(aclnnGeTensor,          ALL,                                   ALL,               a >= b)
BINARY(aclnnLogicalAnd,        ALL,                                   ALL,               a != 0 && b != 0)
BINARY(aclnnLogicalOr,         ALL,                                   ALL,               a != 0 || b != 0)
BINARY(aclnnSigmoidBackward,   FLOATS_AND_DOUBLE,                     FLOATS_AND_DOUBLE, a * b * (1 - b))
BINARY(aclnnTanhBackward,      FLOATS_AND_DOUBLE,                     FLOATS_AND_DOUBLE, a * (1 - b * b))
BINARY(aclnnSiluBackward,      FLOATS,                                FLOATS,            a * logistic(b) * (1 + b * (1 - logistic(b))))

WITH_SCALAR(aclnnMuls,         ALL,                                   ALL,               a * b)
WITH_SCALAR(aclnnDivs,         ALL,                                   ALL,               static_cast<double>(a) / static_cast<double>(b))
WITH_SCALAR(aclnnEqScalar,     ALL,                                   ALL,               a == b)
WITH_SCALAR(aclnnNeScalar,     ALL,                                   ALL,               a != b)
WITH_SCALAR(aclnnLtScalar,     ALL,                                   ALL,               a < b)
WITH_SCALAR(aclnnLeScalar,     ALL,                                   ALL,               a <= b)
WITH_SCALAR(aclnnGtScalar,     ALL,                                   ALL,               a > b)
WITH_SCALAR(aclnnGeScalar,     ALL,                                   ALL,               a >= b)
WITH_SCALAR(aclnnPowTensorScalar, ALL,                                ALL,               power(a, b))

UNARY(aclnnAbs,                ALL,                                   ALL,               x < 0 ? -x : x)
UNARY(aclnnNeg,                FLOATS_AND_DOUBLE | only(ACL_INT8) | INDICES, FLOATS_AND_DOUBLE | only(ACL_INT8) | INDICES, -x)
UNARY(aclnnSign,               FLOATS_AND_DOUBLE | INDICES | BOOLEAN, FLOATS_AND_DOUBLE | INDICES | BOOLEAN, (x > 0) - (x < 0))
UNARY(aclnnRelu,               FLOATS | only(ACL_INT8) | INDICES,     FLOATS | only(ACL_INT8) | INDICES, x > 0 ? x : 0)
UNARY(aclnnFloor,              FLOATS_AND_DOUBLE,                     FLOATS_AND_DOUBLE, std::floor(x))
UNARY(aclnnCeil,               FLOATS_AND_DOUBLE,                     FLOATS_AND_DOUBLE, std::ceil(x))
UNARY(aclnnExp,                FLOATS_AND_DOUBLE | BOOLEAN | only(ACL_INT64), FLOATS_AND_DOUBLE, std::exp(x))
UNARY(aclnnLog,                ALL,                                   FLOATS_AND_DOUBLE, std::log(x))
UNARY(aclnnSqrt,               ALL,                                   FLOATS_AND_DOUBLE, std::sqrt(x))
UNARY(aclnnRsqrt,              ALL,                                   FLOATS_AND_DOUBLE, 1 / std::sqrt(x))
UNARY(aclnnReciprocal,         ALL,                                   FLOATS_AND_DOUBLE, 1 / static_cast<double>(x))
UNARY(aclnnErf,                FLOATS_AND_DOUBLE | BOOLEAN | only(ACL_INT64), FLOATS_AND_DOUBLE, std::erf(x))
UNARY(aclnnTanh,               FLOATS | INTEGERS | BOOLEAN,           FLOATS,            std::tanh(x))
UNARY(aclnnSigmoid,            FLOATS,                                FLOATS,            logistic(x))
UNARY(aclnnSilu,               FLOATS,                                FLOATS,            x * logistic(x))
UNARY(aclnnLogicalNot,         ALL,                                   ALL,               x == 0)

OPERATOR(aclnnCast, (const aclTensor *self, [[maybe_unused]] aclDataType type, const aclTensor *out), {
    call.check("self", *self, ALL);
    call.check("out", *out, ALL);
    call.broadcasts("self", *self, *out);
    return unary(*self, *out, [](auto x) { return x; });
})

// out = condition ? self : other
OPERATOR(aclnnSWhere, (const aclTensor *condition, const aclTensor *self, const aclTensor *other, const aclTensor *out), {
    call.check("condition", *condition, BOOLEAN | only(ACL_UINT8));
    call.check("self", *self, ALL);
    call.check("other", *other, ALL);
    call.check("out", *out, ALL);
    for (const aclTensor *operand : {condition, self, other}) {
        call.broadcasts("an operand", *operand, *out);
    }
    return [choice = *condition, a = *self, b = *other, out = *out] {
        const auto first = read<int64_t>(choice, out.sizes);
        with_wide(is_floating(a.type) || is_floating(b.type), [&](auto wide) {
            auto x = read<decltype(wide)>(a, out.sizes);
            const auto y = read<decltype(wide)>(b, out.sizes);
            for (size_t k = 0; k < x.size(); k++) {
                x[k] = first[k] != 0 ? x[k] : y[k];
            }
            write(out, x);
        });
    };
})

OPERATOR(aclnnInplaceMaskedFillTensor, (const aclTensor *self, const aclTensor *mask, const aclTensor *value), {
    const Types types = FLOATS | BOOLEAN | only(ACL_INT8) | INDICES;
    call.check("selfRef", *self, types);
    call.check("mask", *mask, BOOLEAN);
    call.check("value", *value, types);
    call.broadcasts("mask", *mask, *self);
    call.require(count(value->sizes) == 1, "value is one number, got " + text_of(value->sizes));
    return [self = *self, mask = *mask, value = *value] {
        const auto masked = read<int64_t>(mask, self.sizes);
        with_wide(is_floating(self.type), [&](auto wide) {
            auto x = read<decltype(wide)>(self);
            const auto filler = read<decltype(wide)>(value)[0];
            for (size_t k = 0; k < x.size(); k++) {
                x[k] = masked[k] != 0 ? filler : x[k];
            }
            write(self, x);
        });
    };
})
