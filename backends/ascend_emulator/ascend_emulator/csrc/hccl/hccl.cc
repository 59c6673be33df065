// SPDX-License-Identifier: Apache-2.0
// HCCL's entry points. C++ because the header that torch_npu ships is, so that the compiler checks every signature;
// each function only says what goes where.
#include <cstdio>
#include <cstring>

#include "hccl/hccl.h"

#include "communicator.h"
#include "emulator.h"

static_assert(HCCL_DATA_TYPE_INT8 == 0 && HCCL_DATA_TYPE_FP16 == 3 && HCCL_DATA_TYPE_FP32 == 4 &&
                  HCCL_DATA_TYPE_INT64 == 5 && HCCL_DATA_TYPE_UINT8 == 7 && HCCL_DATA_TYPE_FP64 == 10 &&
                  HCCL_DATA_TYPE_BFP16 == 11 && HCCL_DATA_TYPE_FP8E8M0 == 17,
              "the type numbers of reduce.c");
static_assert(HCCL_REDUCE_SUM == 0 && HCCL_REDUCE_PROD == 1 && HCCL_REDUCE_MAX == 2 && HCCL_REDUCE_MIN == 3,
              "the reduction numbers of reduce.c");

namespace {

npu_communicator *of(HcclComm comm)
{
    return static_cast<npu_communicator *>(comm);
}

// A collective without blocks yet.
npu_collective start(npu_operation operation, HcclDataType type, uint32_t reduction = 0, uint32_t root = 0)
{
    if (npu_type_bytes(type) == 0) {
        npu_die("HCCL type %d is not known to the emulator", static_cast<int>(type));
    }
    npu_collective collective{};
    collective.notice.operation = operation;
    collective.notice.type = type;
    collective.notice.reduction = reduction;
    collective.notice.root = root;
    return collective;
}

// `count` elements at `address` go to every rank.
void send_to_all(npu_collective &collective, const void *address, uint64_t count, uint32_t ranks)
{
    collective.shared = 1;
    collective.from[0] = static_cast<const char *>(address);
    for (uint32_t to = 0; to < ranks; to++) {
        collective.notice.sends[to] = count;
    }
}

// Block j of `count` elements goes to rank j.
void send_blocks(npu_collective &collective, const void *address, uint64_t count, uint32_t ranks)
{
    for (uint32_t to = 0; to < ranks; to++) {
        collective.from[to] = static_cast<const char *>(address) + to * count * npu_type_bytes(collective.notice.type);
        collective.notice.sends[to] = count;
    }
}

// The blocks of `count` elements from all ranks land one after the other.
void receive_blocks(npu_collective &collective, void *address, uint64_t count, uint32_t ranks)
{
    for (uint32_t from = 0; from < ranks; from++) {
        collective.to[from] = static_cast<char *>(address) + from * count * npu_type_bytes(collective.notice.type);
        collective.notice.receives[from] = count;
    }
}

// The blocks of `count` elements from all ranks are reduced into one.
void receive_reduced(npu_collective &collective, void *address, uint64_t count, uint32_t ranks)
{
    collective.reduces = 1;
    collective.to[0] = static_cast<char *>(address);
    for (uint32_t from = 0; from < ranks; from++) {
        collective.notice.receives[from] = count;
    }
}

// HCCL reduces fewer types than it moves.
HcclResult check_reduction(const char *name, HcclDataType type, HcclReduceOp reduction)
{
    if (npu_reduces(type, reduction)) {
        return HCCL_SUCCESS;
    }
    return static_cast<HcclResult>(npu_refuse(
        HCCL_E_NOT_SUPPORT,
        "HCCL's page %s does not list type %d for reduction %d on Atlas A2 and A3; it lists int8, int16, int32, int64, "
        "float16, float32 and bfp16, and products of none of int16 and bfp16",
        name, static_cast<int>(type), static_cast<int>(reduction)));
}

HcclResult go(HcclComm comm, const npu_collective &collective, aclrtStream stream)
{
    npu_collect(of(comm), collective, stream);
    return HCCL_SUCCESS;
}

} // namespace

HcclResult HcclGetRootInfo(HcclRootInfo *root)
{
    std::memset(root, 0, sizeof *root);
    npu_meeting_place(root->internal, sizeof root->internal);
    return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *root, uint32_t rank, HcclComm *comm)
{
    HcclCommConfig config;
    HcclCommConfigInit(&config);
    return HcclCommInitRootInfoConfig(ranks, root, rank, &config, comm);
}

// Of the configuration nothing matters here; how large buffers would be is told to whoever asks.
HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo *root, uint32_t rank,
                                      const HcclCommConfig *config, HcclComm *comm)
{
    if (npu_tells_buffers()) {
        const bool set = config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET;
        const uint32_t size = set ? config->hcclBufferSize : static_cast<uint32_t>(npu_default_buffer_mb());
        std::fprintf(stderr, "emulated NPU: a communicator of %u ranks with buffers of %u MB\n", ranks, size);
    }
    *comm = npu_join(root->internal, ranks, rank);
    return HCCL_SUCCESS;
}

HcclResult HcclCommDestroy(HcclComm comm)
{
    npu_leave(of(comm));
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm comm, char *name)
{
    std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s", npu_communicator_name(of(comm)));
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t *ranks)
{
    *ranks = npu_ranks(of(comm));
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank)
{
    *rank = npu_rank(of(comm));
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm, HcclResult *error)
{
    *error = HCCL_SUCCESS; // errors abort at once
    return HCCL_SUCCESS;
}

const char *HcclGetErrorString(HcclResult)
{
    return "an error of the emulated HCCL; see stderr";
}

uint32_t HcclGetCommConfigCapability()
{
    return HCCL_COMM_CONFIG_RESERVED; // every field of the configuration is accepted, and none matters here
}

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue)
{
    return HCCL_SUCCESS; // results are deterministic whatever is asked for
}

HcclResult HcclAllReduce(void *from, void *to, uint64_t count, HcclDataType type, HcclReduceOp reduction, HcclComm comm,
                         aclrtStream stream)
{
    if (const HcclResult refused = check_reduction("HcclAllReduce", type, reduction); refused != HCCL_SUCCESS) {
        return refused;
    }
    npu_collective collective = start(ALL_REDUCE, type, reduction);
    send_to_all(collective, from, count, npu_ranks(of(comm)));
    receive_reduced(collective, to, count, npu_ranks(of(comm)));
    return go(comm, collective, stream);
}

HcclResult HcclReduce(void *from, void *to, uint64_t count, HcclDataType type, HcclReduceOp reduction, uint32_t root,
                      HcclComm comm, aclrtStream stream)
{
    if (const HcclResult refused = check_reduction("HcclReduce", type, reduction); refused != HCCL_SUCCESS) {
        return refused;
    }
    npu_collective collective = start(REDUCE, type, reduction, root);
    collective.shared = 1;
    collective.from[0] = static_cast<const char *>(from);
    collective.notice.sends[root] = count;
    if (npu_rank(of(comm)) == root) {
        receive_reduced(collective, to, count, npu_ranks(of(comm)));
    }
    return go(comm, collective, stream);
}

HcclResult HcclBroadcast(void *buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                         aclrtStream stream)
{
    npu_collective collective = start(BROADCAST, type, 0, root);
    collective.shared = 1;
    collective.to[root] = static_cast<char *>(buffer);
    collective.notice.receives[root] = count;
    if (npu_rank(of(comm)) == root) {
        send_to_all(collective, buffer, count, npu_ranks(of(comm)));
    }
    return go(comm, collective, stream);
}

HcclResult HcclScatter(void *from, void *to, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                       aclrtStream stream)
{
    npu_collective collective = start(SCATTER, type, 0, root);
    collective.to[root] = static_cast<char *>(to);
    collective.notice.receives[root] = count;
    if (npu_rank(of(comm)) == root) {
        send_blocks(collective, from, count, npu_ranks(of(comm)));
    }
    return go(comm, collective, stream);
}

HcclResult HcclAllGather(void *from, void *to, uint64_t count, HcclDataType type, HcclComm comm, aclrtStream stream)
{
    npu_collective collective = start(ALL_GATHER, type);
    send_to_all(collective, from, count, npu_ranks(of(comm)));
    receive_blocks(collective, to, count, npu_ranks(of(comm)));
    return go(comm, collective, stream);
}

HcclResult HcclAllGatherV(void *from, uint64_t count, void *to, const void *counts, const void *places,
                          HcclDataType type, HcclComm comm, aclrtStream stream)
{
    npu_collective collective = start(ALL_GATHER, type);
    send_to_all(collective, from, count, npu_ranks(of(comm)));
    for (uint32_t rank = 0; rank < npu_ranks(of(comm)); rank++) {
        collective.to[rank] =
            static_cast<char *>(to) + static_cast<const uint64_t *>(places)[rank] * npu_type_bytes(type);
        collective.notice.receives[rank] = static_cast<const uint64_t *>(counts)[rank];
    }
    return go(comm, collective, stream);
}

HcclResult HcclReduceScatter(void *from, void *to, uint64_t count, HcclDataType type, HcclReduceOp reduction,
                             HcclComm comm, aclrtStream stream)
{
    if (const HcclResult refused = check_reduction("HcclReduceScatter", type, reduction); refused != HCCL_SUCCESS) {
        return refused;
    }
    npu_collective collective = start(REDUCE_SCATTER, type, reduction);
    send_blocks(collective, from, count, npu_ranks(of(comm)));
    receive_reduced(collective, to, count, npu_ranks(of(comm)));
    return go(comm, collective, stream);
}

HcclResult HcclReduceScatterV(void *from, const void *counts, const void *places, void *to, uint64_t count,
                              HcclDataType type, HcclReduceOp reduction, HcclComm comm, aclrtStream stream)
{
    if (const HcclResult refused = check_reduction("HcclReduceScatterV", type, reduction); refused != HCCL_SUCCESS) {
        return refused;
    }
    npu_collective collective = start(REDUCE_SCATTER, type, reduction);
    for (uint32_t rank = 0; rank < npu_ranks(of(comm)); rank++) {
        collective.from[rank] =
            static_cast<const char *>(from) + static_cast<const uint64_t *>(places)[rank] * npu_type_bytes(type);
        collective.notice.sends[rank] = static_cast<const uint64_t *>(counts)[rank];
    }
    receive_reduced(collective, to, count, npu_ranks(of(comm)));
    return go(comm, collective, stream);
}

HcclResult HcclAlltoAll(const void *from, uint64_t sends, HcclDataType type, const void *to, uint64_t receives,
                        HcclDataType, HcclComm comm, aclrtStream stream)
{
    npu_collective collective = start(ALL_TO_ALL, type);
    send_blocks(collective, from, sends, npu_ranks(of(comm)));
    receive_blocks(collective, const_cast<void *>(to), receives, npu_ranks(of(comm)));
    return go(comm, collective, stream);
}

HcclResult HcclAlltoAllV(const void *from, const void *sends, const void *send_places, HcclDataType type,
                         const void *to, const void *receives, const void *receive_places, HcclDataType, HcclComm comm,
                         aclrtStream stream)
{
    npu_collective collective = start(ALL_TO_ALL, type);
    for (uint32_t rank = 0; rank < npu_ranks(of(comm)); rank++) {
        collective.from[rank] =
            static_cast<const char *>(from) + static_cast<const uint64_t *>(send_places)[rank] * npu_type_bytes(type);
        collective.to[rank] = static_cast<char *>(const_cast<void *>(to)) +
                              static_cast<const uint64_t *>(receive_places)[rank] * npu_type_bytes(type);
        collective.notice.sends[rank] = static_cast<const uint64_t *>(sends)[rank];
        collective.notice.receives[rank] = static_cast<const uint64_t *>(receives)[rank];
    }
    return go(comm, collective, stream);
}

HcclResult HcclBarrier(HcclComm comm, aclrtStream stream)
{
    return go(comm, start(BARRIER, HCCL_DATA_TYPE_INT8), stream);
}
