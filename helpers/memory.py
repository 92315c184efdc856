"""Memory of a training process on a CPU."""

import ctypes
import sys

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for the next step instead of giving it back; returns whether it can.

    Every training step allocates and frees the same large tensors. By default glibc returns them to the system, which
    has to zero each page again when it is touched: a fifth of the time of a step with 256 clips. Other C libraries are
    left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, INT_MAX))
