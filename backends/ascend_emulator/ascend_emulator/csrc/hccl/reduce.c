/* SPDX-License-Identifier: Apache-2.0 */
/* The element types of HCCL: their sizes, and reductions over them. */
#include <stddef.h>
#include <string.h>

#include "communicator.h"
#include "emulator.h"

/* HcclDataType and HcclReduceOp, which only C++ can include; hccl.cc asserts that the numbers are the same. */
enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BF16, INT128, HIF8 = 14, FP8E4M3,
       FP8E5M2, FP8E8M0 };
enum { SUM, PROD, MAX, MIN };

size_t npu_type_bytes(uint32_t type)
{
    switch (type) {
    case INT8: case UINT8: case HIF8: case FP8E4M3: case FP8E5M2: case FP8E8M0:
        return 1;
    case INT16: case UINT16: case FP16: case BF16:
        return 2;
    case INT32: case UINT32: case FP32:
        return 4;
    case INT64: case UINT64: case FP64:
        return 8;
    case INT128:
        return 16;
    default:
        return 0;
    }
}

static float load_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Rounded to the nearest, ties to even; NaN stays NaN. */
static uint16_t store_bf16(float value)
{
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if (value != value) {
        return (uint16_t)(wide >> 16 | 0x40);
    }
    return (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

#define SAME(value) (value)

/* One function per type: the elements are of type T, the arithmetic is done in W. */
#define DEFINE_REDUCE(NAME, T, W, LOAD, STORE)                                                                         \
    static void NAME(char *result, const char *const *pieces, uint32_t ranks, size_t elements, uint32_t reduction)     \
    {                                                                                                                  \
        for (size_t k = 0; k < elements; k++) {                                                                        \
            W total = LOAD(((const T *)(const void *)pieces[0])[k]);                                                   \
            for (uint32_t rank = 1; rank < ranks; rank++) {                                                            \
                W value = LOAD(((const T *)(const void *)pieces[rank])[k]);                                            \
                switch (reduction) {                                                                                   \
                case SUM: total = (W)(total + value); break;                                                           \
                case PROD: total = (W)(total * value); break;                                                          \
                case MAX: total = value > total || value != value ? value : total; break;                              \
                default: total = value < total || value != value ? value : total; break;                               \
                }                                                                                                      \
            }                                                                                                          \
            ((T *)(void *)result)[k] = (T)STORE(total);                                                                \
        }                                                                                                              \
    }

DEFINE_REDUCE(reduce_int8, int8_t, int8_t, SAME, SAME)
DEFINE_REDUCE(reduce_int16, int16_t, int16_t, SAME, SAME)
DEFINE_REDUCE(reduce_int32, int32_t, int32_t, SAME, SAME)
DEFINE_REDUCE(reduce_int64, int64_t, int64_t, SAME, SAME)
DEFINE_REDUCE(reduce_fp32, float, float, SAME, SAME)
DEFINE_REDUCE(reduce_fp16, _Float16, float, (float), SAME)
DEFINE_REDUCE(reduce_bf16, uint16_t, float, load_bf16, store_bf16)

typedef void (*reducer)(char *, const char *const *, uint32_t, size_t, uint32_t);

/* The types that HCCL's pages (HcclAllReduce, HcclReduce, HcclReduceScatter) list for Atlas A2 and A3. */
static const reducer reducers[] = {
    [INT8] = reduce_int8, [INT16] = reduce_int16, [INT32] = reduce_int32, [INT64] = reduce_int64,
    [FP16] = reduce_fp16, [FP32] = reduce_fp32,   [BF16] = reduce_bf16,
};

int npu_reduces(uint32_t type, uint32_t reduction)
{
    return type < sizeof reducers / sizeof *reducers && reducers[type] != NULL && reduction <= MIN &&
           !(reduction == PROD && (type == INT16 || type == BF16));
}

void npu_reduce(char *result, const char *const *pieces, uint32_t ranks, size_t elements, uint32_t type,
                uint32_t reduction)
{
    if (!npu_reduces(type, reduction)) {
        npu_die("no reduction %u for HCCL type %u in the emulator", reduction, type);
    }
    reducers[type](result, pieces, ranks, elements, reduction);
}
