"""What a thread asks of the kernel's scheduler: to be given a core soon, for a short while.

A thread that answers requests runs for some tens of microseconds and waits for the next one. With
the slice of all others, 1.4 to 3 ms, it waits for the slice of whoever computes to end: a shadow, a
version that is being opened, a stranger. Linux 6.12 and later let a thread ask for shorter slices,
and one that wakes with a shorter slice goes first (`sched(7)`, `sched_setattr(2)`; in the kernel's
kernel/sched/fair.c `PREEMPT_SHORT`). It gets no more of a core for that, only sooner.
"""

import ctypes
import os
import platform
import struct
import sys

SLICE_NS = 100_000
"""The shortest that the kernel grants."""
_SYSCALLS = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
"""Numbers of `sched_setattr`, which the C library wraps only since glibc 2.41."""
_ATTR = struct.Struct("IIQiIQQQ")
"""`struct sched_attr` as of its first version."""
_RESET_ON_FORK = 1
"""Threads that this one starts are given the slice of all others."""


def take_short_turns() -> bool:
    """Ask for short slices for the calling thread; False where that is not to be had.

    A thread of another policy than the usual one, or with a priority above it, is left as it is:
    somebody meant it. Kernels before 6.12 agree, and change nothing.
    """
    if sys.platform != "linux" or sys.maxsize < 1 << 32:  # Numbers of system calls are others.
        return False
    number = _SYSCALLS.get(platform.machine())
    try:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        is_usual = os.sched_getscheduler(0) == os.SCHED_OTHER and nice >= 0
    except OSError:  # A sandbox that lets nobody ask.
        return False
    if number is None or not is_usual:
        return False
    told = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, SLICE_NS, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, told, 0) == 0)
