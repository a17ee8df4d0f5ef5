"""Tuning of the C library's allocator and of Python's garbage collector."""

import atexit
import ctypes
import gc
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAX_RETAINED = 32 * 2**20  # maximum that glibc accepts
GLIBC_TUNABLES, TCACHE_COUNT = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"  # read by glibc when a process starts


def retain_freed_memory() -> bool:
    """Let glibc retain freed buffers of up to 32 MiB for reuse instead of returning them to the kernel.

    Ranking a thousand candidates frees and allocates hundreds of tensors of a few MiB. A buffer returned to the kernel
    costs its page faults again; they measured as 40 % of the time on CPU. Larger buffers, such as tables, are still
    mapped and returned individually.

    Returns:
        Whether the C library accepted the setting; only glibc supports it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_RETAINED) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def disable_tcache_in_children() -> None:
    """Disable glibc's per-thread cache (tcache) in child processes, through the environment that they inherit.

    torch allocates 64-byte-aligned blocks. glibc puts the leading remainder into the per-thread cache, which prevents
    neighbouring free chunks from coalescing. Under overload this made the heaps of ranking workers 1.5 times larger.
    tcache can only be disabled before a process starts.
    """
    tunables = os.environ.get(GLIBC_TUNABLES, "")
    if platform.libc_ver()[0] == "glibc" and TCACHE_COUNT not in tunables:
        os.environ[GLIBC_TUNABLES] = f"{tunables}:{TCACHE_COUNT}=0".lstrip(":")


def freeze_gc() -> None:
    """Exclude all current objects from garbage collection.

    Otherwise the collector repeatedly traverses a catalog of a million names while requests wait. There is no final
    collection, for which requests would wait as well, so the little current garbage stays. Other objects are still
    freed when their reference count drops to 0.
    """
    gc.freeze()
    atexit.unregister(gc.unfreeze)
    atexit.register(gc.unfreeze)  # extensions report objects left at exit
