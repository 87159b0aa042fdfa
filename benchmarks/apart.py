"""Processes of this machine that are far from each other: each in a network of its own, with a time that packets take between any two.

Belongs here: those networks. Does not belong here: what the processes do (ranks.py), longer ways that are computed (cluster.py).

Every network has one interface, whose packets this process reads and writes (Linux, /dev/net/tun): it hands each one to the network that it is for, so long
after it came. No bandwidth is missing, and no packet is lost.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import selectors
import struct
import subprocess
import time
from collections.abc import Callable
from types import TracebackType

NEW_NETWORK = 0x40000000  # CLONE_NEWNET
INTERFACE, AS_A_TUNNEL = 0x400454CA, 0x1001  # TUNSETIFF; IFF_TUN | IFF_NO_PI
NAME = "tun0"
MOST = 1 << 16  # bytes of a packet


def refused() -> str:
    """Why this machine makes no networks; "" if it does."""
    if os.geteuid():
        return "making networks is for the administrator"
    return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "there is no /dev/net/tun"


def _called(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Networks:
    """So many, which packets need `seconds` to reach from each other. To be made before a process is forked that is to enter one.

    Raises:
        OSError: the machine makes none.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self.seconds = seconds
        self._system = ctypes.CDLL(None, use_errno=True)
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._networks: list[int] = []
        self._interfaces: list[int] = []
        try:
            for k in range(count):
                _called(self._system.unshare(NEW_NETWORK))
                self._networks.append(os.open("/proc/self/ns/net", os.O_RDONLY))
                self._interfaces.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
                fcntl.ioctl(self._interfaces[k], INTERFACE, struct.pack("16sH", NAME.encode(), AS_A_TUNNEL))
                for command in (f"addr add 10.9.0.{k + 1}/24 dev {NAME}", f"link set {NAME} up", "link set lo up"):
                    subprocess.run(["ip", *command.split()], check=True)
        finally:
            _called(self._system.setns(self._home, NEW_NETWORK))

    def enter(self, rank: int) -> None:
        """This process, a fork of the one that made them, is in that one from now on, and gloo takes its interface."""
        _called(self._system.setns(self._networks[rank], NEW_NETWORK))
        os.environ["GLOO_SOCKET_IFNAME"] = NAME

    def carry(self, until: Callable[[], bool]) -> None:
        """Hand packets on until that is so, which is asked now and then."""
        selector = selectors.DefaultSelector()
        for interface in self._interfaces:
            selector.register(interface, selectors.EVENT_READ)
        under_way: list[tuple[float, int, int, bytes]] = []
        count, asked = 0, 0.0
        while (now := time.monotonic()) < asked + 0.1 or not until():
            asked = asked if now < asked + 0.1 else now
            while under_way and under_way[0][0] <= now:
                _, _, to, packet = heapq.heappop(under_way)
                os.write(self._interfaces[to], packet)
            wait = min(0.05, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.05
            for key, _ in selector.select(wait):
                while (packet := _read(key.fd)) is not None:
                    to = packet[19] - 1  # IPv4: the last byte of whom it is for
                    if packet[0] >> 4 == 4 and packet[16:19] == bytes((10, 9, 0)) and 0 <= to < len(self._interfaces):
                        count += 1
                        heapq.heappush(under_way, (time.monotonic() + self.seconds, count, to, packet))
        selector.close()

    def __enter__(self) -> Networks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for fd in (*self._interfaces, *self._networks, self._home):
            os.close(fd)


def _read(interface: int) -> bytes | None:
    try:
        return os.read(interface, MOST)
    except BlockingIOError:
        return None
