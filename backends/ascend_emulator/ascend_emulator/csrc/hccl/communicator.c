/* SPDX-License-Identifier: Apache-2.0 */
/* Meeting in shared memory, and the one movement of all collectives. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "communicator.h"
#include "emulator.h"

#define SLOT_BYTES ((size_t)1 << 20) /* per rank: larger messages go in pieces */
#define LOOK_AROUND_MS 50            /* how often a waiting rank looks whether its peers still live */

struct segment {
    uint32_t arrived, generation; /* of the meeting: how many are here, how many meetings there have been */
    struct {
        int32_t pid;
        uint64_t meetings; /* that this rank has come to */
    } members[MAX_RANKS];
    /* Two sets in turn: a fast rank may write its next notice while a slow one still reads the last. */
    struct npu_notice notices[2][MAX_RANKS];
    char slots[] __attribute__((aligned(64)));
};

struct npu_communicator {
    struct segment *segment;
    size_t bytes;
    uint32_t ranks, rank;
    char name[64];
    int memory; /* the descriptor that peers open; -1 except at the first rank while it joins */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t issued, turn; /* calls made, and the call whose turn it is to run */
};

struct task {
    struct npu_communicator *communicator;
    struct npu_collective collective;
};

static const char *operation_name(uint32_t operation)
{
    static const char *const names[] = {"all_reduce",     "broadcast",  "reduce",  "all_gather",
                                        "reduce_scatter", "all_to_all", "scatter", "barrier"};
    return operation < sizeof names / sizeof *names ? names[operation] : "an unknown operation";
}

void npu_meeting_place(char *text, size_t capacity)
{
    int memory = memfd_create("emulated-hccl", MFD_CLOEXEC);
    if (memory < 0) {
        npu_die("no shared memory for a communicator: %s", strerror(errno));
    }
    snprintf(text, capacity, "%d:%d", getpid(), memory);
}

/* Whether a process runs: it may also be a zombie, ended but not yet waited for. */
static int lives(int32_t pid)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return 0;
    }
    size_t length = fread(line, 1, sizeof line - 1, file);
    fclose(file);
    line[length] = '\0';
    const char *name_end = strrchr(line, ')');
    return name_end == NULL || length == 0 || (name_end[2] != 'Z' && name_end[2] != 'X');
}

/* Abort if a peer that is not here yet has ended, or if it is too late. */
static void look_around(const struct npu_communicator *communicator, double waited, const char *what)
{
    const struct segment *segment = communicator->segment;
    uint64_t mine = segment->members[communicator->rank].meetings;
    char late[128] = "";
    for (uint32_t peer = 0; peer < communicator->ranks; peer++) {
        int32_t pid = __atomic_load_n(&segment->members[peer].pid, __ATOMIC_ACQUIRE);
        if (__atomic_load_n(&segment->members[peer].meetings, __ATOMIC_ACQUIRE) >= mine) {
            continue;
        }
        if (pid != 0 && !lives(pid)) {
            npu_die("rank %u (process %d) of communicator %s ended while rank %u waited for it in %s", peer, pid,
                    communicator->name, communicator->rank, what);
        }
        snprintf(late + strlen(late), sizeof late - strlen(late), " %u", peer);
    }
    if (waited > npu_deadline_s()) {
        npu_die("rank %u of communicator %s waited %d s in %s for rank%s; EMULATED_NPU_DEADLINE_S sets the limit",
                communicator->rank, communicator->name, npu_deadline_s(), what, late);
    }
}

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Wait until all ranks are here. */
static void meet(struct npu_communicator *communicator, const char *what)
{
    struct segment *segment = communicator->segment;
    uint32_t generation = __atomic_load_n(&segment->generation, __ATOMIC_ACQUIRE);
    __atomic_add_fetch(&segment->members[communicator->rank].meetings, 1, __ATOMIC_ACQ_REL);
    if (__atomic_add_fetch(&segment->arrived, 1, __ATOMIC_ACQ_REL) == communicator->ranks) {
        __atomic_store_n(&segment->arrived, 0, __ATOMIC_RELEASE);
        __atomic_add_fetch(&segment->generation, 1, __ATOMIC_ACQ_REL);
        syscall(SYS_futex, &segment->generation, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        return;
    }
    struct timespec pause = {0, LOOK_AROUND_MS * 1000000L};
    double start = now_s();
    while (__atomic_load_n(&segment->generation, __ATOMIC_ACQUIRE) == generation) {
        long result = syscall(SYS_futex, &segment->generation, FUTEX_WAIT, generation, &pause, NULL, 0);
        int timed_out = result != 0 && errno == ETIMEDOUT;
        /* The last rank may have come and ended meanwhile, which is not a failure: look at the meeting once more. */
        if (timed_out && __atomic_load_n(&segment->generation, __ATOMIC_ACQUIRE) == generation) {
            look_around(communicator, now_s() - start, what);
        }
    }
}

struct npu_communicator *npu_join(const char *place, uint32_t ranks, uint32_t rank)
{
    int pid, number;
    if (sscanf(place, "%d:%d", &pid, &number) != 2) {
        npu_die("'%s' is no meeting place of the emulated HCCL", place);
    }
    if (ranks > MAX_RANKS || rank >= ranks) {
        npu_die("rank %u of %u ranks: the emulated HCCL has at most %d ranks", rank, ranks, MAX_RANKS);
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, number);
    int memory = pid == getpid() ? number : open(path, O_RDWR | O_CLOEXEC);
    if (memory < 0) {
        npu_die("rank %u cannot join: the first rank (process %d) has ended or is not on this machine: %s", rank, pid,
                strerror(errno));
    }
    struct npu_communicator *communicator = calloc(1, sizeof *communicator);
    if (communicator == NULL) {
        npu_die("no memory for a communicator");
    }
    communicator->bytes = sizeof(struct segment) + ranks * SLOT_BYTES;
    communicator->ranks = ranks;
    communicator->rank = rank;
    snprintf(communicator->name, sizeof communicator->name, "emulated-%d-%d", pid, number);
    pthread_mutex_init(&communicator->lock, NULL);
    pthread_cond_init(&communicator->changed, NULL);
    if (ftruncate(memory, (off_t)communicator->bytes) != 0) { /* every rank asks for the same size */
        npu_die("no shared memory for communicator %s: %s", communicator->name, strerror(errno));
    }
    void *address = mmap(NULL, communicator->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (address == MAP_FAILED) {
        npu_die("no shared memory for communicator %s: %s", communicator->name, strerror(errno));
    }
    communicator->segment = address;
    __atomic_store_n(&communicator->segment->members[rank].pid, getpid(), __ATOMIC_RELEASE);
    meet(communicator, "joining");
    close(memory); /* all have it now, and the kernel frees it with the last of them */
    return communicator;
}

void npu_leave(struct npu_communicator *communicator)
{
    npu_drain_all();
    munmap(communicator->segment, communicator->bytes);
    free(communicator);
}

const char *npu_communicator_name(const struct npu_communicator *communicator)
{
    return communicator->name;
}

uint32_t npu_ranks(const struct npu_communicator *communicator)
{
    return communicator->ranks;
}

uint32_t npu_rank(const struct npu_communicator *communicator)
{
    return communicator->rank;
}

/* Abort, on every rank and with the same words, unless all notices fit together. */
static void agree(const struct npu_communicator *communicator, const struct npu_notice *notices)
{
    const struct npu_notice *first = &notices[0];
    for (uint32_t rank = 1; rank < communicator->ranks; rank++) {
        const struct npu_notice *other = &notices[rank];
        if (other->operation != first->operation) {
            npu_die("rank 0 calls %s where rank %u calls %s (call %lu of communicator %s)",
                    operation_name(first->operation), rank, operation_name(other->operation),
                    (unsigned long)first->number, communicator->name);
        }
        if (other->type != first->type || other->reduction != first->reduction || other->root != first->root) {
            npu_die("rank 0 calls %s with type %u, reduction %u and root %u, rank %u with type %u, reduction %u and "
                    "root %u (call %lu of communicator %s)",
                    operation_name(first->operation), first->type, first->reduction, first->root, rank, other->type,
                    other->reduction, other->root, (unsigned long)first->number, communicator->name);
        }
    }
    for (uint32_t from = 0; from < communicator->ranks; from++) {
        for (uint32_t to = 0; to < communicator->ranks; to++) {
            if (notices[from].sends[to] != notices[to].receives[from]) {
                npu_die("%s: rank %u sends %lu elements to rank %u, which expects %lu (call %lu of communicator %s)",
                        operation_name(first->operation), from, (unsigned long)notices[from].sends[to], to,
                        (unsigned long)notices[to].receives[from], (unsigned long)first->number, communicator->name);
            }
        }
    }
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* How much of a block of `bytes` is in the piece that begins at `offset`. */
static size_t piece_bytes(size_t bytes, size_t offset, size_t capacity)
{
    return offset >= bytes ? 0 : smaller(bytes - offset, capacity);
}

/* Fill this rank's slot with the pieces that begin at `offset`. */
static void fill(struct npu_communicator *communicator, const struct npu_collective *collective, size_t element,
                 size_t offset, size_t capacity)
{
    char *slot = communicator->segment->slots + communicator->rank * SLOT_BYTES;
    for (uint32_t to = 0; to < communicator->ranks; to++) {
        size_t bytes = piece_bytes(collective->notice.sends[to] * element, offset, capacity);
        if (bytes > 0) {
            memcpy(collective->shared ? slot : slot + to * capacity,
                   (collective->shared ? collective->from[0] : collective->from[to]) + offset, bytes);
        }
        if (bytes > 0 && collective->shared) {
            break; /* one piece for everybody */
        }
    }
}

/* Take the pieces that begin at `offset` and are for this rank. */
static void take(struct npu_communicator *communicator, const struct npu_collective *collective, size_t element,
                 size_t offset, size_t capacity)
{
    const char *pieces[MAX_RANKS];
    const struct npu_notice *notice = &collective->notice;
    for (uint32_t from = 0; from < communicator->ranks; from++) {
        size_t place = from * SLOT_BYTES + (collective->shared ? 0 : communicator->rank * capacity);
        pieces[from] = communicator->segment->slots + place;
        size_t bytes = piece_bytes(notice->receives[from] * element, offset, capacity);
        if (bytes > 0 && !collective->reduces) {
            memcpy(collective->to[from] + offset, pieces[from], bytes);
        }
    }
    size_t bytes = piece_bytes(notice->receives[0] * element, offset, capacity);
    if (bytes > 0 && collective->reduces) {
        npu_reduce(collective->to[0] + offset, pieces, communicator->ranks, bytes / element, notice->type,
                   notice->reduction);
    }
}

static void move(struct npu_communicator *communicator, const struct npu_collective *collective)
{
    const struct npu_notice *mine = &collective->notice;
    struct npu_notice *notices = communicator->segment->notices[mine->number % 2];
    char what[96];
    snprintf(what, sizeof what, "%s (call %lu)", operation_name(mine->operation), (unsigned long)mine->number);
    notices[communicator->rank] = *mine;
    meet(communicator, what);
    agree(communicator, notices);

    size_t element = npu_type_bytes(mine->type), most = 0;
    for (uint32_t from = 0; from < communicator->ranks; from++) {
        for (uint32_t to = 0; to < communicator->ranks; to++) {
            size_t bytes = notices[from].sends[to] * element;
            most = bytes > most ? bytes : most;
        }
    }
    size_t capacity = (collective->shared ? SLOT_BYTES : SLOT_BYTES / communicator->ranks) / 64 * 64;
    for (size_t offset = 0; offset < most; offset += capacity) {
        fill(communicator, collective, element, offset, capacity);
        meet(communicator, what);
        take(communicator, collective, element, offset, capacity);
        meet(communicator, what);
    }
}

static void run(void *argument)
{
    struct task *task = argument;
    struct npu_communicator *communicator = task->communicator;
    pthread_mutex_lock(&communicator->lock);
    while (communicator->turn != task->collective.notice.number) {
        pthread_cond_wait(&communicator->changed, &communicator->lock);
    }
    pthread_mutex_unlock(&communicator->lock);
    move(communicator, &task->collective);
    pthread_mutex_lock(&communicator->lock);
    communicator->turn++;
    pthread_cond_broadcast(&communicator->changed);
    pthread_mutex_unlock(&communicator->lock);
    free(task);
}

void npu_collect(struct npu_communicator *communicator, struct npu_collective collective, void *stream)
{
    struct task *task = malloc(sizeof *task);
    if (task == NULL) {
        npu_die("no memory for a collective");
    }
    pthread_mutex_lock(&communicator->lock);
    collective.notice.number = communicator->issued++;
    pthread_mutex_unlock(&communicator->lock);
    *task = (struct task){communicator, collective};
    npu_enqueue(stream, run, task, 1);
}
