/* SPDX-License-Identifier: Apache-2.0 */
/* Events: marks in streams that other streams and the host can wait for. */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "acl/acl_rt.h"
#include "emulator.h"

/* An event may be recorded again while an earlier record still waits in a queue, so records are numbered: a wait is for
   the newest record at the moment of the call, not for whatever comes later. Tasks in queues keep the event alive. */
struct event {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t recorded, reached;
    struct timespec when; /* of the newest record that was reached */
    int holders;
};

struct mark {
    struct event *event;
    uint64_t number;
};

static void release(struct event *event)
{
    pthread_mutex_lock(&event->lock);
    int holders = --event->holders;
    pthread_mutex_unlock(&event->lock);
    if (holders == 0) {
        pthread_mutex_destroy(&event->lock);
        pthread_cond_destroy(&event->changed);
        free(event);
    }
}

static void reach(void *argument)
{
    struct mark *mark = argument;
    struct event *event = mark->event;
    pthread_mutex_lock(&event->lock);
    if (event->reached < mark->number) {
        event->reached = mark->number;
    }
    clock_gettime(CLOCK_MONOTONIC, &event->when);
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->lock);
    release(event);
    free(mark);
}

static void wait_for(struct event *event, uint64_t number)
{
    pthread_mutex_lock(&event->lock);
    while (event->reached < number) {
        pthread_cond_wait(&event->changed, &event->lock);
    }
    pthread_mutex_unlock(&event->lock);
}

static void wait_in_stream(void *argument)
{
    struct mark *mark = argument;
    wait_for(mark->event, mark->number);
    release(mark->event);
    free(mark);
}

static void enqueue_mark(struct event *event, aclrtStream stream, npu_task task, int is_record)
{
    struct mark *mark = malloc(sizeof *mark);
    if (mark == NULL) {
        npu_die("no memory for an event");
    }
    pthread_mutex_lock(&event->lock);
    event->holders++;
    event->recorded += is_record ? 1 : 0;
    *mark = (struct mark){event, event->recorded};
    pthread_mutex_unlock(&event->lock);
    npu_enqueue(stream, task, mark, 0);
}

aclError aclrtCreateEventWithFlag(aclrtEvent *handle, uint32_t flag)
{
    (void)flag;
    struct event *event = calloc(1, sizeof *event);
    if (event == NULL) {
        npu_die("no memory for an event");
    }
    pthread_mutex_init(&event->lock, NULL);
    pthread_cond_init(&event->changed, NULL);
    event->holders = 1;
    *handle = event;
    return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent *handle, uint32_t flag)
{
    return aclrtCreateEventWithFlag(handle, flag);
}

aclError aclrtDestroyEvent(aclrtEvent event)
{
    release(event);
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream)
{
    enqueue_mark(event, stream, reach, 1);
    return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event)
{
    enqueue_mark(event, stream, wait_in_stream, 0);
    return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream)
{
    (void)event; /* records are numbered, so there is nothing to take back */
    (void)stream;
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent handle)
{
    struct event *event = handle;
    pthread_mutex_lock(&event->lock);
    uint64_t number = event->recorded;
    pthread_mutex_unlock(&event->lock);
    wait_for(event, number);
    return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus *status)
{
    struct event *event = handle;
    pthread_mutex_lock(&event->lock);
    *status = event->recorded > 0 && event->reached >= event->recorded ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                                                       : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    pthread_mutex_unlock(&event->lock);
    return ACL_SUCCESS;
}

static struct timespec reached_when(struct event *event)
{
    pthread_mutex_lock(&event->lock);
    struct timespec when = event->when;
    pthread_mutex_unlock(&event->lock);
    return when;
}

aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end)
{
    struct timespec first = reached_when(start), last = reached_when(end);
    *milliseconds = (float)((double)(last.tv_sec - first.tv_sec) * 1e3 + (double)(last.tv_nsec - first.tv_nsec) / 1e6);
    return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t *microseconds)
{
    struct timespec when = reached_when(event);
    *microseconds = (uint64_t)when.tv_sec * 1000000 + (uint64_t)when.tv_nsec / 1000;
    return ACL_SUCCESS;
}
