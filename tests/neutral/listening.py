# SPDX-License-Identifier: Apache-2.0
"""Who can reach a run: the addresses at which its processes listen, read from the kernel's own tables."""

import os
import socket
import struct
from pathlib import Path

LISTEN = "0A"


def descendants(root):
    """Process ids of all that *root* has started, itself among them."""
    children = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def addresses(pids):
    """The addresses at which the processes *pids* listen for TCP."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(struct.pack("<I", n) for n in struct.unpack(f">{len(words) // 4}I", words))
                found.append(socket.inet_ntop(family, packed))
    return found


def of_this_process_and_its_children():
    """The addresses, while a world of this process runs."""
    return addresses(descendants(os.getpid()))


def beyond_loopback(found):
    """Those of *found* that others than this machine can reach."""
    return [
        address for address in found if not address.startswith("127.") and address not in ("::1", "::ffff:127.0.0.1")
    ]
