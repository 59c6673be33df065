/* SPDX-License-Identifier: Apache-2.0 */
/* Streams: a thread and a queue each. */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "acl/acl_rt.h"
#include "emulator.h"

struct entry {
    npu_task task;
    void *argument;
    bool delayed;
    struct entry *next;
};

struct stream {
    pthread_t worker;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct entry *head, **tail;
    uint64_t put, done; /* how many tasks came in and how many have run */
    bool closing;
    int id;
    struct stream *next; /* in the list of all streams */
};

static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream *streams, *default_stream;
static int streams_made;

static void *work(void *argument)
{
    struct stream *stream = argument;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (stream->head == NULL && !stream->closing) {
            pthread_cond_wait(&stream->changed, &stream->lock);
        }
        struct entry *entry = stream->head;
        if (entry == NULL) {
            break;
        }
        stream->head = entry->next;
        if (stream->head == NULL) {
            stream->tail = &stream->head;
        }
        pthread_mutex_unlock(&stream->lock);
        if (entry->delayed && npu_delay_ms() > 0) {
            int delay = npu_delay_ms();
            struct timespec pause = {delay / 1000, (long)(delay % 1000) * 1000000};
            nanosleep(&pause, NULL);
        }
        entry->task(entry->argument);
        free(entry);
        pthread_mutex_lock(&stream->lock);
        stream->done++;
        pthread_cond_broadcast(&stream->changed);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

/* A new stream, in the list of all streams; the caller holds streams_lock. */
static struct stream *new_stream(void)
{
    struct stream *stream = calloc(1, sizeof *stream);
    if (stream == NULL) {
        npu_die("no memory for a stream");
    }
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->changed, NULL);
    stream->tail = &stream->head;
    stream->id = streams_made++;
    if (pthread_create(&stream->worker, NULL, work, stream) != 0) {
        npu_die("no thread for a stream");
    }
    stream->next = streams;
    streams = stream;
    return stream;
}

static struct stream *resolve(void *handle)
{
    if (handle != NULL) {
        return handle;
    }
    pthread_mutex_lock(&streams_lock);
    if (default_stream == NULL) {
        default_stream = new_stream();
    }
    pthread_mutex_unlock(&streams_lock);
    return default_stream;
}

void npu_enqueue(void *handle, npu_task task, void *argument, int delayed)
{
    struct stream *stream = resolve(handle);
    struct entry *entry = malloc(sizeof *entry);
    if (entry == NULL) {
        npu_die("no memory for a task of stream %d", stream->id);
    }
    *entry = (struct entry){.task = task, .argument = argument, .delayed = delayed};
    pthread_mutex_lock(&stream->lock);
    *stream->tail = entry;
    stream->tail = &entry->next;
    stream->put++;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
}

/* Wait until what is in the queue now has run, at most `timeout_ms` (negative: no limit). Returns 0, or ETIMEDOUT. */
static int drain(struct stream *stream, int timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    if (timeout_ms >= 0) {
        int64_t nanoseconds = until.tv_nsec + (int64_t)(timeout_ms % 1000) * 1000000;
        until.tv_sec += timeout_ms / 1000 + nanoseconds / 1000000000;
        until.tv_nsec = nanoseconds % 1000000000;
    }
    int result = 0;
    pthread_mutex_lock(&stream->lock);
    uint64_t mark = stream->put;
    while (stream->done < mark && result != ETIMEDOUT) {
        if (timeout_ms < 0) {
            pthread_cond_wait(&stream->changed, &stream->lock);
        } else {
            result = pthread_cond_timedwait(&stream->changed, &stream->lock, &until);
        }
    }
    result = stream->done < mark ? ETIMEDOUT : 0;
    pthread_mutex_unlock(&stream->lock);
    return result;
}

void npu_drain(void *handle)
{
    drain(resolve(handle), -1);
}

void npu_drain_all(void)
{
    pthread_mutex_lock(&streams_lock); /* held throughout: a stream that is destroyed meanwhile waits for this */
    for (struct stream *stream = streams; stream != NULL; stream = stream->next) {
        drain(stream, -1);
    }
    pthread_mutex_unlock(&streams_lock);
}

aclError aclrtCreateStream(aclrtStream *stream)
{
    pthread_mutex_lock(&streams_lock);
    *stream = new_stream();
    pthread_mutex_unlock(&streams_lock);
    return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag)
{
    (void)priority;
    (void)flag;
    return aclrtCreateStream(stream);
}

aclError aclrtDestroyStream(aclrtStream handle)
{
    struct stream *stream = handle;
    if (stream == NULL) {
        return ACL_ERROR_INVALID_PARAM;
    }
    pthread_mutex_lock(&streams_lock);
    for (struct stream **link = &streams; *link != NULL; link = &(*link)->next) {
        if (*link == stream) {
            *link = stream->next;
            break;
        }
    }
    pthread_mutex_unlock(&streams_lock);
    pthread_mutex_lock(&stream->lock);
    stream->closing = true;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    pthread_join(stream->worker, NULL); /* what is still in the queue runs first, as on hardware */
    pthread_mutex_destroy(&stream->lock);
    pthread_cond_destroy(&stream->changed);
    free(stream);
    return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream stream)
{
    return aclrtDestroyStream(stream);
}

aclError aclrtSynchronizeStream(aclrtStream stream)
{
    npu_drain(stream);
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout)
{
    return drain(resolve(stream), timeout) == 0 ? ACL_SUCCESS : ACL_ERROR_RT_STREAM_SYNC_TIMEOUT;
}

aclError aclrtSynchronizeDevice(void)
{
    npu_drain_all();
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout)
{
    (void)timeout; /* every task ends by itself: collectives have their own deadline */
    npu_drain_all();
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus *status)
{
    struct stream *stream = resolve(handle);
    pthread_mutex_lock(&stream->lock);
    *status = stream->done == stream->put ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    pthread_mutex_unlock(&stream->lock);
    return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t *id)
{
    *id = resolve(stream)->id;
    return ACL_SUCCESS;
}
