"""Memory of a training process on a CPU."""

import ctypes
import sys

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
INT_MAX = 2**31 - 1
LARGEST_KEPT = 32 << 20  # bytes; glibc's limit, and larger tensors would leave gaps that only grow the process


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for the next step instead of giving it back; returns whether it can.

    Every training step allocates and frees the same tensors. By default glibc returns many of them to the system, which
    has to zero each page again when it is touched, a tenth of the time of a step and more. Other C libraries are left
    as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, INT_MAX))
