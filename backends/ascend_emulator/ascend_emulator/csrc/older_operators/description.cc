// SPDX-License-Identifier: Apache-2.0
#include "description.h"

#include "emulator.h"

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dims, const int64_t *sizes, aclFormat format)
{
    return new aclTensorDesc{type, format, {sizes, sizes + dims}, "", nullptr};
}

void aclDestroyTensorDesc(const aclTensorDesc *description)
{
    delete description;
}

// The device's own layout of a tensor: here all are dense.
aclError aclSetTensorShape(aclTensorDesc *, int, const int64_t *)
{
    return ACL_SUCCESS;
}

aclError aclSetTensorFormat(aclTensorDesc *, aclFormat)
{
    return ACL_SUCCESS;
}

aclError aclSetTensorPlaceMent(aclTensorDesc *, aclMemType)
{
    return ACL_SUCCESS;
}

aclError aclSetTensorConst(aclTensorDesc *description, void *values, size_t bytes)
{
    const char *first = static_cast<const char *>(values);
    description->constant = std::make_shared<std::vector<char>>(first, first + bytes);
    return ACL_SUCCESS;
}

void aclSetTensorDescName(aclTensorDesc *description, const char *name)
{
    description->name = name;
}

size_t aclGetTensorDescSize(const aclTensorDesc *description)
{
    return static_cast<size_t>(emulated::count(description->sizes)) * emulated::element_bytes(description->type);
}

size_t aclGetTensorDescNumDims(const aclTensorDesc *description)
{
    return description->sizes.size();
}

int64_t aclGetTensorDescDim(const aclTensorDesc *description, size_t dim)
{
    return description->sizes[dim];
}

aclError aclGetTensorDescDimV2(const aclTensorDesc *description, size_t dim, int64_t *size)
{
    *size = description->sizes[dim];
    return ACL_SUCCESS;
}

size_t aclDataTypeSize(aclDataType type)
{
    return emulated::element_bytes(type);
}

aclDataBuffer *aclCreateDataBuffer(void *address, size_t bytes)
{
    return new aclDataBuffer{address, bytes};
}

aclError aclDestroyDataBuffer(const aclDataBuffer *buffer)
{
    delete buffer;
    return ACL_SUCCESS;
}

void *aclGetDataBufferAddr(const aclDataBuffer *buffer)
{
    return buffer->address;
}

aclError aclUpdateDataBuffer(aclDataBuffer *buffer, void *address, size_t bytes)
{
    *buffer = {address, bytes};
    return ACL_SUCCESS;
}

aclopAttr *aclopCreateAttr()
{
    return new aclopAttr;
}

void aclopDestroyAttr(const aclopAttr *attributes)
{
    delete attributes;
}

aclError aclopSetAttrInt(aclopAttr *attributes, const char *name, int64_t value)
{
    attributes->integers[name] = value;
    return ACL_SUCCESS;
}

aclError aclopSetAttrBool(aclopAttr *attributes, const char *name, uint8_t value)
{
    return aclopSetAttrInt(attributes, name, value);
}

aclError aclopSetAttrDataType(aclopAttr *attributes, const char *name, aclDataType value)
{
    return aclopSetAttrInt(attributes, name, value);
}

aclError aclopSetAttrFloat(aclopAttr *attributes, const char *name, float value)
{
    attributes->numbers[name] = value;
    return ACL_SUCCESS;
}

// Attributes of other kinds; no operator that is emulated has one.
aclError aclopSetAttrString(aclopAttr *, const char *, const char *)
{
    return ACL_SUCCESS;
}

aclError aclopSetAttrListInt(aclopAttr *, const char *, int, const int64_t *)
{
    return ACL_SUCCESS;
}
