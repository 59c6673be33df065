/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the emulated Ascend runtime share: options, failure, and the one queue that everything asynchronous
   goes through.

   An emulated device is this process: device memory is host memory, and a stream is a thread that runs tasks in the
   order in which they were put in. Kernels are elsewhere: CANN's operators, which MindSpore calls, in ../operators, where
   each is a task of its stream; PyTorch's in Python (torch_kernels), which waits for its stream first. */
#ifndef NPU_EMULATOR_H
#define NPU_EMULATOR_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Milliseconds for which a stream waits before each copy and each collective, EMULATED_NPU_DELAY_MS. Zero unless set.
   A program that reads a result without waiting for its stream then reads what was in memory before. */
int npu_delay_ms(void);

/* Seconds after which a rank that waits for its peers gives up, EMULATED_NPU_DEADLINE_S. */
int npu_deadline_s(void);

/* The number of devices, EMULATED_NPUS. None unless set: only a program that was told so runs on emulated devices. */
int npu_device_count(void);

/* Whether calls that hardware is slow at are told on stderr, EMULATED_NPU_TELL_SLOW: operators of CANN's older interface,
   which are compiled at the first call with new sizes, and sorts of integers, which the AI CPU does. Not unless set. */
int npu_tells_slow(void);

/* Whether the size of its buffers is told on stderr for each communicator, EMULATED_NPU_TELL_BUFFERS; and that size where
   a communicator is not given another one, HCCL_BUFFSIZE, in MB. There are no such buffers here. */
int npu_tells_buffers(void);
int npu_default_buffer_mb(void);

/* Say what went wrong on stderr, and abort. */
void npu_die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Put a task into a stream's queue; a NULL stream is the default stream. `task` owns `argument` and runs on the
   stream's thread, after all that is in the queue already; `delayed` tasks wait npu_delay_ms() first. */
typedef void (*npu_task)(void *argument);
void npu_enqueue(void *stream, npu_task task, void *argument, int delayed);

/* Wait until all that is in the queue of a stream now, or of all streams, has run. */
void npu_drain(void *stream);
void npu_drain_all(void);

/* Fill new device memory with garbage: huge negative numbers, so that a result that is read too early is seen. */
void npu_fill_new_memory(void *address, size_t bytes);

/* Refuse a call: what is said here is printed, and aclGetRecentErrMsg() gives it to this thread. Returns `code`. */
int npu_refuse(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif
#endif
