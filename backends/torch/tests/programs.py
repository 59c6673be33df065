# SPDX-License-Identifier: Apache-2.0
"""Programs for the launcher's tests; each is called as ``program(platform, **arguments)`` on every rank."""

import os
import resource
import signal
import time


def total(platform, number):
    platform.barrier()
    return platform.to_host(platform.all_reduce(platform.arange(3) + number * platform.rank))[0].tolist()


def raise_on(platform, bad_rank):
    if platform.rank == bad_rank:
        raise ZeroDivisionError("division of an expert by zero")
    platform.barrier()


def die_on(platform, bad_rank):
    platform.barrier()
    if platform.rank == bad_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    platform.barrier()


def sleep_on(platform, bad_rank):
    if platform.rank == bad_rank:
        time.sleep(250)
    platform.barrier()


def write_pid_and_sleep(platform, folder):
    # As deaf to requests as a rank that waits in native code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(250)


def faults_of_the_next_tensor(platform):
    """Page faults of a tensor of 400 MB, when one of that size was there before; the least of several tries."""

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        platform.xp.ones((100, 1_000_000))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    return min(faults() for _ in range(5))
