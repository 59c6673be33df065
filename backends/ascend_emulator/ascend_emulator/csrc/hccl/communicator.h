/* SPDX-License-Identifier: Apache-2.0 */
/* Communicators: processes of one machine that meet in shared memory.

   Every collective is the same movement. Rank i has a block for each rank j, and says so in its notice: `sends[j]`
   elements go to j, `receives[i]` are expected from i. All ranks read all notices, so all of them see a disagreement
   and all of them abort with the same words. Then the blocks go through the ranks' slots of shared memory, in as many
   pieces as it takes:

       rank 0  | to 0 | to 1 |      every rank fills its slot with the next piece of each of its blocks,
       rank 1  | to 0 | to 1 |      all meet, every rank takes what is for it from every slot, all meet again.

   Where all ranks get the same block (`shared`), the slot holds one piece for everybody. */
#ifndef NPU_EMULATOR_COMMUNICATOR_H
#define NPU_EMULATOR_COMMUNICATOR_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MAX_RANKS 8

enum npu_operation { ALL_REDUCE, BROADCAST, REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, SCATTER, BARRIER };

/* What a rank is about to do. Counts are elements; types and reductions are HCCL's numbers. */
struct npu_notice {
    uint32_t operation, type, reduction, root;
    uint64_t number; /* of this call on this communicator, from 0 */
    uint64_t sends[MAX_RANKS], receives[MAX_RANKS];
};

struct npu_collective {
    struct npu_notice notice;
    const char *from[MAX_RANKS]; /* the block for each rank; only from[0] where `shared` */
    char *to[MAX_RANKS];         /* where the block of each rank goes; only to[0] where `reduces` */
    int shared, reduces;
};

struct npu_communicator;

/* A fresh meeting place, as text that the first rank hands to the others; it lives as long as the first rank's process
   until all have joined, and leaves nothing behind in any case. */
void npu_meeting_place(char *text, size_t capacity);

/* Join as rank `rank` of `ranks`; returns when all have. */
struct npu_communicator *npu_join(const char *place, uint32_t ranks, uint32_t rank);

void npu_leave(struct npu_communicator *communicator);
const char *npu_communicator_name(const struct npu_communicator *communicator);
uint32_t npu_ranks(const struct npu_communicator *communicator);
uint32_t npu_rank(const struct npu_communicator *communicator);

/* Put a collective into a stream. Collectives of one communicator run in the order of these calls, whichever streams
   they are in. */
void npu_collect(struct npu_communicator *communicator, struct npu_collective collective, void *stream);

/* The size of an element of an HCCL type in bytes, and 0 for a type that the emulator does not know. */
size_t npu_type_bytes(uint32_t type);

/* Whether HCCL reduces that type in that way. */
int npu_reduces(uint32_t type, uint32_t reduction);

/* result[k] = the reduction over `ranks` of pieces[rank][k], in rank order. Sums and products of 16-bit floats are
   made in float and rounded once. */
void npu_reduce(char *result, const char *const *pieces, uint32_t ranks, size_t elements, uint32_t type,
                uint32_t reduction);

#ifdef __cplusplus
}
#endif
#endif
