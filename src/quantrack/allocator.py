"""Let the C library keep freed memory: a network asks for the same large tensors in every pass.

glibc gives freed memory back to the system but for 64 MiB at most, and has new memory filled with zeros page by page.
PyTorch's CPU tensors come from there: a float pass of YOLOv10n, eight pictures at a time, took a quarter to a third
longer.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # `M_...` of glibc's malloc.h
LARGEST_KEPT = 32 << 20  # bytes of one block; glibc takes no more
MOST_KEPT = 512 << 20  # bytes of free memory at the heap's end


def keep_freed_memory() -> bool:
    """Have this process keep up to 512 MiB that it has freed; False where the C library is another one (mallopt(3))."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((MMAP_THRESHOLD, LARGEST_KEPT), (TRIM_THRESHOLD, MOST_KEPT))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
