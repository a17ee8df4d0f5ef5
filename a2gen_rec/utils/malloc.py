"""How the C library hands out host memory, and what Python's collector looks through."""

import atexit
import ctypes
import gc
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT = 32 * 2**20  # the most that glibc accepts
GLIBC_TUNABLES, TCACHE_COUNT = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"  # read as a process begins, by glibc alone


def retain_freed_memory() -> bool:
    """Let glibc keep freed buffers of up to 32 MiB for the next ones, instead of giving them back to the kernel.

    Ranking a thousand candidates frees and allocates hundreds of tensors of some MiB. Given back, each costs its
    page faults again, which measured as 40 % of the time on CPU. Larger buffers, such as tables, are mapped and
    returned one by one as before.

    Returns:
        whether the C library took the setting; others than glibc do not know it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def disable_tcache_in_children() -> None:
    """Let processes that this one begins from now on join freed memory with its neighbours at once, of glibc.

    It is told in this process's environment, which they inherit.

    torch asks for memory at multiples of 64 bytes; what glibc cuts off in front goes, freed, into a cache of its
    thread, between holes that cannot grow together then: after some overload, heaps of processes that rank were half as
    large again as without these caches. They can only be switched off before a process begins.
    """
    said = os.environ.get(GLIBC_TUNABLES, "")
    if platform.libc_ver()[0] == "glibc" and TCACHE_COUNT not in said:
        os.environ[GLIBC_TUNABLES] = f"{said}:{TCACHE_COUNT}=0".lstrip(":")


def freeze_gc() -> None:
    """Take all there is now out of sight of Python's collector, which would walk through a catalogue of a million names
    again and again while requests wait.

    It does not look through it a last time either, for which requests would wait too. So the little that is garbage by
    now stays; what is not is freed once nothing refers to it, as ever.
    """
    gc.freeze()
    atexit.unregister(gc.unfreeze)
    atexit.register(gc.unfreeze)  # extensions complain of what is left at the end
