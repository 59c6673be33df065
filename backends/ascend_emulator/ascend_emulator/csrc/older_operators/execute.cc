// SPDX-License-Identifier: Apache-2.0
// The operators of the older interface that are emulated, as a table, and the way they are run.
#include <cstdio>

#include "acl/acl_op_compiler.h"
#include "call.h"
#include "description.h"
#include "emulator.h"
#include "kernels.h"

using namespace emulated;

namespace {

struct Operands {
    std::vector<aclTensor> in, out;
    std::vector<std::shared_ptr<std::vector<char>>> constants; // at which some of `in` look
    aclopAttr attributes;

    int64_t attribute(const char *name, int64_t otherwise) const
    {
        auto found = attributes.integers.find(name);
        return found == attributes.integers.end() ? otherwise : found->second;
    }

    double rate(const char *name) const
    {
        auto found = attributes.numbers.find(name);
        return found == attributes.numbers.end() ? 0 : found->second;
    }

    // The number that an input holds.
    int64_t integer(size_t input) const { return read<int64_t>(in[input])[0]; }

    double number(size_t input) const { return read<double>(in[input])[0]; }
};

int64_t axis_of(const aclTensor &tensor, int64_t given)
{
    return given < 0 ? given + static_cast<int64_t>(tensor.sizes.size()) : given;
}

void gather(const Operands &of)
{
    take("GatherV2", of.in[0], axis_of(of.in[0], of.in.size() > 2 ? of.integer(2) : 0), of.in[1], of.out[0]);
}

void pack(const Operands &of)
{
    const int64_t axis = axis_of(of.out[0], of.attribute("axis", 0));
    for (size_t k = 0; k < of.in.size(); k++) {
        copy(of.in[k], selected(of.out[0], axis, static_cast<int64_t>(k)));
    }
}

void unpack(const Operands &of)
{
    const int64_t axis = axis_of(of.in[0], of.attribute("axis", 0));
    for (size_t k = 0; k < of.out.size(); k++) {
        copy(selected(of.in[0], axis, static_cast<int64_t>(k)), of.out[k]);
    }
}

void sort_by(const Operands &of)
{
    const bool descending = of.attribute("descending", 0) != 0, stable = of.attribute("stable", 0) != 0;
    sort(of.in[0], axis_of(of.in[0], of.attribute("axis", -1)), descending, stable, of.out[0], of.out[1]);
}

void top_k(const Operands &of)
{
    sort(of.in[0], axis_of(of.in[0], of.attribute("dim", -1)), of.attribute("largest", 1) != 0, false, of.out[0], of.out[1]);
}

void cumulative_sum(const Operands &of)
{
    const bool exclusive = of.attribute("exclusive", 0) != 0, reverse = of.attribute("reverse", 0) != 0;
    running_sum(of.in[0], axis_of(of.in[0], of.integer(1)), exclusive, reverse, of.out[0]);
}

void range(const Operands &of)
{
    with_wide(is_floating(of.out[0].type), [&](auto wide) {
        using W = decltype(wide);
        evenly_spaced(read<W>(of.in[0])[0], read<W>(of.in[2])[0], of.out[0]);
    });
}

void unsorted_segment_sum(const Operands &of)
{
    const aclTensor &x = of.in[0];
    with_wide(is_floating(x.type), [&](auto wide) {
        const auto values = read<decltype(wide)>(x);
        const auto segments = read<int64_t>(of.in[1]);
        const size_t width = segments.empty() ? 0 : values.size() / segments.size();
        Array<decltype(wide)> totals(static_cast<size_t>(count(of.out[0].sizes)));
        for (size_t row = 0; row < segments.size(); row++) {
            if (segments[row] < 0) {
                continue; // left out, as documented
            }
            const int64_t segment = inside("UnsortedSegmentSum", segments[row], of.out[0].sizes[0]);
            for (size_t k = 0; k < width; k++) {
                totals[static_cast<size_t>(segment) * width + k] += values[row * width + k];
            }
        }
        write(of.out[0], totals);
    });
}

void sqrt_gradient(const Operands &of)
{
    auto y = read<double>(of.in[0]);
    const auto dy = read<double>(of.in[1]);
    for (size_t k = 0; k < y.size(); k++) {
        y[k] = dy[k] * 0.5 / y[k];
    }
    write(of.out[0], y);
}

// An operator with an output of the same name as an input writes into that input; the output may be elsewhere.
template <class W> void update(const aclTensor &reference, const aclTensor &output, const Array<W> &values)
{
    write(reference, values);
    write(output, values);
}

void add_to(const Operands &of)
{
    with_wide(is_floating(of.in[0].type), [&](auto wide) {
        using W = decltype(wide);
        auto sum = read<W>(of.in[0]);
        const auto value = read<W>(of.in[1], of.in[0].sizes);
        for (size_t k = 0; k < sum.size(); k++) {
            sum[k] += value[k];
        }
        update(of.in[0], of.out[0], sum);
    });
}

// Momentum begins with the first gradient itself, for which `stat` is positive.
void descend(const Operands &of)
{
    auto parameters = read<double>(of.in[0]), velocity = read<double>(of.in[3]), stat = read<double>(of.in[5]);
    const auto gradient = read<double>(of.in[1]);
    const double rate = of.number(2), momentum = of.number(4);
    const bool nesterov = of.attribute("nesterov", 0) != 0;
    for (size_t k = 0; k < parameters.size(); k++) {
        const double slope = gradient[k] + of.rate("weight_decay") * parameters[k];
        if (momentum <= 0) {
            parameters[k] -= rate * slope;
            continue;
        }
        velocity[k] = stat[k] > 0 ? slope : momentum * velocity[k] + (1 - of.rate("dampening")) * slope;
        stat[k] = 0;
        parameters[k] -= rate * (nesterov ? slope + momentum * velocity[k] : velocity[k]);
    }
    write(of.in[3], velocity);
    write(of.in[5], stat);
    update(of.in[0], of.out[0], parameters);
}

// The same elements in the same order, whatever the sizes.
void move(const Operands &of)
{
    with_wide(is_floating(of.in[0].type), [&](auto wide) { write(of.out[0], read<decltype(wide)>(of.in[0])); });
}

struct Older {
    const char *type;
    Types types; // that the operator's proto header lists for its output
    void (*run)(const Operands &);
};

const Older table[] = {
    {"AssignAdd", ALL & ~BOOLEAN, add_to},
    {"Cumsum", ALL & ~BOOLEAN, cumulative_sum},
    {"ExpandDims", ALL, move},
    {"Fill", ALL, [](const Operands &of) { fill(of.out[0], of.number(1), of.integer(1)); }},
    {"Gather", ALL, gather},
    {"GatherV2", ALL, gather},
    {"Identity", ALL, move},
    {"OnesLike", ALL, [](const Operands &of) { fill(of.out[0], 1, 1); }},
    {"Pack", ALL, pack},
    {"Range", FLOATS_AND_DOUBLE | INDICES, range},
    {"Reshape", ALL, move},
    {"SGD", only(ACL_FLOAT16) | only(ACL_FLOAT), descend},
    {"Sort", (FLOATS | INTEGERS), sort_by},
    {"SqrtGrad", FLOATS_AND_DOUBLE, sqrt_gradient},
    {"TensorMove", ALL, move},
    {"TopK", FLOATS_AND_DOUBLE | INTEGERS, top_k},
    {"TopKV2", FLOATS_AND_DOUBLE | INTEGERS, top_k},
    {"Unpack", ALL & ~BOOLEAN, unpack},
    {"UnsortedSegmentSum", ALL & ~BOOLEAN, unsorted_segment_sum},
    {"ZerosLike", ALL, [](const Operands &of) { fill(of.out[0], 0, 0); }},
};

aclTensor dense(const aclTensorDesc &description, const aclDataBuffer &buffer)
{
    aclTensor made{description.sizes, Dims(description.sizes.size()), description.type, static_cast<char *>(buffer.address)};
    int64_t step = 1;
    for (size_t dim = made.sizes.size(); dim-- > 0;) {
        made.strides[dim] = step;
        step *= made.sizes[dim];
    }
    if (description.constant != nullptr) {
        made.first = description.constant->data();
    }
    return made;
}

struct Task {
    void (*run)(const Operands &);
    Operands operands;
};

void run_task(void *argument)
{
    auto *task = static_cast<Task *>(argument);
    task->run(task->operands);
    delete task;
}

} // namespace

aclError aclopCompileAndExecute(const char *type, int inputs, const aclTensorDesc *const in[],
                                const aclDataBuffer *const in_buffers[], int outputs, const aclTensorDesc *const out[],
                                aclDataBuffer *const out_buffers[], const aclopAttr *attributes, aclopEngineType,
                                aclopCompileType, const char *, aclrtStream stream)
{
    const Older *found = nullptr;
    for (const Older &entry : table) {
        found = std::string(entry.type) == type ? &entry : found;
    }
    if (found == nullptr) {
        return npu_refuse(ACL_ERROR_OP_NOT_FOUND, "operator %s of CANN's older interface is not emulated", type);
    }
    for (int k = 0; k < outputs && k < 1; k++) {
        if (!contains(found->types, out[k]->type)) {
            return npu_refuse(ACL_ERROR_OP_INPUT_NOT_MATCH,
                              "%s: CANN's proto header of %s does not list %s; of the types that are emulated it lists %s",
                              type, type, name_of(out[k]->type).c_str(), names_of(found->types).c_str());
        }
    }
    if (npu_tells_slow()) {
        std::fprintf(stderr, "emulated NPU: slow: %s is of the older interface\n", type);
    }
    auto *task = new Task{found->run, {}};
    for (int k = 0; k < inputs; k++) {
        task->operands.in.push_back(dense(*in[k], *in_buffers[k]));
        task->operands.constants.push_back(in[k]->constant);
    }
    for (int k = 0; k < outputs; k++) {
        task->operands.out.push_back(dense(*out[k], *out_buffers[k]));
    }
    if (attributes != nullptr) {
        task->operands.attributes = *attributes;
    }
    npu_enqueue(stream, run_task, task, 0);
    return ACL_SUCCESS;
}

aclError aclopCompileAndExecuteV2(const char *type, int inputs, aclTensorDesc *in[], aclDataBuffer *in_buffers[],
                                  int outputs, aclTensorDesc *out[], aclDataBuffer *out_buffers[], aclopAttr *attributes,
                                  aclopEngineType engine, aclopCompileType compile, const char *path, aclrtStream stream)
{
    return aclopCompileAndExecute(type, inputs, in, in_buffers, outputs, out, out_buffers, attributes, engine, compile,
                                  path, stream);
}
