# SPDX-License-Identifier: Apache-2.0
"""A launcher without a framework, and what its ranks run."""

import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

from hyperep.launch import Auxiliary, Launcher, LaunchPlan, RankProcess, step_done
from hyperep.launch.doing import doing


class Plain(Launcher):
    """One process per rank; a platform is its rank."""

    def __init__(self, auxiliaries=(), per_process=1):
        self.auxiliaries = auxiliaries

    def joined(self):
        return False

    def plan(self, ranks):
        processes = tuple(RankProcess(ranks=(r,), environment={"PLAIN_RANK": str(r)}) for r in range(ranks))
        return LaunchPlan(processes=processes, auxiliaries=self.auxiliaries)

    def host(self, process, function, platform_name):
        return [function(SimpleNamespace(rank=int(os.environ["PLAIN_RANK"]), name=platform_name))]


class Unstartable(Plain):
    def host(self, process, function, platform_name):
        if process.ranks == (1,):
            raise ImportError("libframework.so: not found")
        return super().host(process, function, platform_name)


class Meeting(Plain):
    """Every rank listens on the port of its plan; those of the first plans are taken already."""

    def __init__(self, ports):
        super().__init__()
        self.ports = ports
        self.plans = 0

    def plan(self, ranks):
        port = self.ports[self.plans]
        self.plans += 1
        processes = (RankProcess(ranks=(0,), environment={"PLAIN_RANK": "0", "PLAIN_PORT": str(port)}),)
        return LaunchPlan(processes=processes)

    def host(self, process, function, platform_name):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", int(os.environ["PLAIN_PORT"])))
            listener.listen()
            return super().host(process, function, platform_name)


class HandlersOfItsOwn(Plain):
    """As some frameworks do, it takes signals for itself when it is imported, after the process has begun."""

    def host(self, process, function, platform_name):
        for number in (signal.SIGSEGV, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        return super().host(process, function, platform_name)


def scheduler(code):
    return Auxiliary(name="scheduler", command=(sys.executable, "-c", code))


def describe(platform, greeting):
    return f"{greeting} from {platform.name} rank {platform.rank}"


def process_id(platform):
    return os.getpid()


def process_ids_of_children(platform):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return os.getpid(), child.pid


def fail_on(platform, rank, wait=0.0):
    if platform.rank == rank:
        time.sleep(wait)
        raise LookupError(f"no such expert on rank {rank}")
    time.sleep(0 if wait == 0 else 600)


def fail_deep(platform, rank, depth):
    if depth:
        return fail_deep(platform, rank, depth - 1) or depth
    return fail_on(platform, rank)


def die_on(platform, rank):
    if platform.rank == rank:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if platform.rank == rank + 1:
        time.sleep(0.1)
        raise ConnectionError("a peer has gone")
    time.sleep(600)


def stand_still_here(platform, rank):
    if platform.rank == rank:
        print("standing still", flush=True)
        time.sleep(600)


def signal_myself_on(platform, rank, number):
    """The rank is hit from outside; its peers notice, as by a broken connection, before anybody else does."""
    if platform.rank == rank:
        time.sleep(0.5)
        os.kill(os.getpid(), number)
        time.sleep(600)
    time.sleep(0.2)
    raise ConnectionError("a peer has gone\nand a second line of it")


def crash_on(platform, rank):
    doing("all_gather(float32[3, 4])")
    if platform.rank == rank:
        time.sleep(0.3)
        ctypes.string_at(1)
    time.sleep(600)


def wait_deep_inside(platform):
    """The author's line is far from the innermost one, which stands in somebody else's code."""
    subprocess.run(["sleep", "600"])


def wrong_on(platform, rank):
    if platform.rank < rank:
        time.sleep(600)
    return "rows differ" if platform.rank == rank else ""


def stop_on(platform, rank):
    if platform.rank == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def steps(platform, count, seconds, stuck_on=None):
    for _ in range(count):
        time.sleep(seconds)
        step_done()
    if platform.rank == stuck_on:
        stand_still_here(platform, stuck_on)
    return count


def meeting_place(platform):
    folder = os.environ["HYPEREP_MEETING"]
    return folder, stat.filemode(os.stat(folder).st_mode)


def tell_and_stay(platform):
    print(os.getpid(), flush=True)
    time.sleep(600)


def stand_apart(platform):
    stand_still_here(platform, 0) if platform.rank == 0 else stand_still_there(platform)


def stand_still_there(platform):
    time.sleep(600)
