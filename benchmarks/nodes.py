# SPDX-License-Identifier: Apache-2.0
"""Several machines on one: network namespaces around a bridge, each with a link of a given rate.

Needs Linux, root, and Debian's iproute2. Only the rate is like that of a slow link: no delay and no loss are made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Node", "nodes", "reason_against"]

_LINK = "link0"


@dataclass(frozen=True)
class Node:
    """One of the machines."""

    namespace: str
    address: str

    def popen(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start a command there; its output is a pipe, and standard error goes where this process's does."""
        within = ["ip", "netns", "exec", self.namespace, *command]
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": _LINK, **environment}
        return subprocess.Popen(within, env=variables, stdout=subprocess.PIPE, text=True)


def reason_against() -> str:
    """Why there can be none here; empty if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if not shutil.which(program):
            return f"no program {program} on PATH; install iproute2"
    probe = f"hyperep-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return ""


@contextmanager
def nodes(count: int, rate: str) -> Iterator[list[Node]]:
    """Make *count* machines whose links send *rate* (as ``tc`` writes it, ``400mbit``), and take them down again.

    Raises:
        OSError: they cannot be made here.
    """
    tag = f"hyperep-{os.getpid()}"
    hub, made = f"{tag}-hub", []
    try:
        _make(hub, made)
        _within(hub, "ip link add bridge0 type bridge")
        _within(hub, "ip link set bridge0 up")
        found = []
        for number in range(count):
            node = Node(f"{tag}-{number}", f"10.77.{os.getpid() % 250}.{number + 1}")
            _make(node.namespace, made)
            port = f"port{number}"
            _run("ip", "link", "add", _LINK, "netns", node.namespace, "type", "veth", "peer", port, "netns", hub)
            _within(hub, f"ip link set {port} master bridge0 up")
            _within(node.namespace, "ip link set lo up")
            _within(node.namespace, f"ip addr add {node.address}/24 dev {_LINK}")
            _within(node.namespace, f"ip link set {_LINK} up")
            _within(node.namespace, f"tc qdisc add dev {_LINK} root tbf rate {rate} burst 256kb latency 400ms")
            found.append(node)
        yield found
    finally:
        for namespace in reversed(made):
            _run("ip", "netns", "del", namespace)


def _make(namespace: str, made: list[str]) -> None:
    _run("ip", "netns", "add", namespace)
    made.append(namespace)


def _within(namespace: str, command: str) -> None:
    _run("ip", "netns", "exec", namespace, *command.split())


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
