/* SPDX-License-Identifier: Apache-2.0 */
/* The environment variables that set the emulated device up, and the way in which it fails. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "emulator.h"

static int number(const char *name, int otherwise)
{
    const char *text = getenv(name);
    if (text == NULL || *text == '\0') {
        return otherwise;
    }
    char *end;
    long value = strtol(text, &end, 10);
    if (*end != '\0' || value < 0 || value > 86400000) {
        npu_die("%s=%s is not a whole number of at least 0; correct it or unset it", name, text);
    }
    return (int)value;
}

int npu_delay_ms(void)
{
    return number("EMULATED_NPU_DELAY_MS", 0);
}

int npu_deadline_s(void)
{
    return number("EMULATED_NPU_DEADLINE_S", 120);
}

int npu_device_count(void)
{
    return number("EMULATED_NPUS", 0);
}

int npu_tells_slow(void)
{
    return number("EMULATED_NPU_TELL_SLOW", 0);
}

int npu_tells_buffers(void)
{
    return number("EMULATED_NPU_TELL_BUFFERS", 0);
}

int npu_default_buffer_mb(void)
{
    return number("HCCL_BUFFSIZE", 200);
}

static __thread char refusal[1024];

int npu_refuse(int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(refusal, sizeof refusal, format, arguments);
    va_end(arguments);
    fprintf(stderr, "emulated NPU: %s\n", refusal);
    return code;
}

const char *aclGetRecentErrMsg(void)
{
    static __thread char told[sizeof refusal];
    if (refusal[0] == '\0') {
        return "the emulated NPU has no further message";
    }
    memcpy(told, refusal, sizeof told);
    refusal[0] = '\0'; /* as with CANN, a message is told once */
    return told;
}

void npu_die(const char *format, ...)
{
    va_list arguments;
    char line[2048];
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fprintf(stderr, "emulated NPU: %s\n", line); /* one call, so that the lines of several ranks do not mix */
    fflush(stderr);
    abort();
}
