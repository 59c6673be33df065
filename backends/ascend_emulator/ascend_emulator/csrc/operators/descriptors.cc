// SPDX-License-Identifier: Apache-2.0
// CANN's descriptors of operands: tensors over device memory, scalars, and lists of either.
#include "elements.h"
#include "tensor.h"

extern "C" {

aclTensor *aclCreateTensor(const int64_t *sizes, uint64_t dims, aclDataType type, const int64_t *strides,
                           int64_t offset, aclFormat, const int64_t *, uint64_t, void *storage)
{
    const int64_t bytes = static_cast<int64_t>(emulated::element_bytes(type));
    return new aclTensor{{sizes, sizes + dims}, {strides, strides + dims}, type,
                         static_cast<char *>(storage) + offset * bytes};
}

aclError aclDestroyTensor(const aclTensor *tensor)
{
    delete tensor;
    return ACL_SUCCESS;
}

aclScalar *aclCreateScalar(void *value, aclDataType type)
{
    auto *scalar = new aclScalar{type, 0, 0};
    emulated::with_element(type, [&](auto element) {
        scalar->number = element.template load<double>(static_cast<char *>(value));
        scalar->integer = emulated::is_floating(type) ? 0 : element.template load<int64_t>(static_cast<char *>(value));
    });
    return scalar;
}

aclError aclDestroyScalar(const aclScalar *scalar)
{
    delete scalar;
    return ACL_SUCCESS;
}

aclIntArray *aclCreateIntArray(const int64_t *values, uint64_t count)
{
    return new aclIntArray{{values, values + count}};
}

aclError aclDestroyIntArray(const aclIntArray *array)
{
    delete array;
    return ACL_SUCCESS;
}

aclFloatArray *aclCreateFloatArray(const float *values, uint64_t count)
{
    return new aclFloatArray{{values, values + count}};
}

aclError aclDestroyFloatArray(const aclFloatArray *array)
{
    delete array;
    return ACL_SUCCESS;
}

aclBoolArray *aclCreateBoolArray(const bool *values, uint64_t count)
{
    return new aclBoolArray{{values, values + count}};
}

aclError aclDestroyBoolArray(const aclBoolArray *array)
{
    delete array;
    return ACL_SUCCESS;
}

// The list owns its tensors, as CANN's does.
aclTensorList *aclCreateTensorList(const aclTensor *const *tensors, uint64_t count)
{
    auto **first = const_cast<aclTensor **>(tensors);
    return new aclTensorList{{first, first + count}};
}

aclError aclDestroyTensorList(const aclTensorList *list)
{
    for (aclTensor *tensor : list->tensors) {
        delete tensor;
    }
    delete list;
    return ACL_SUCCESS;
}
}
