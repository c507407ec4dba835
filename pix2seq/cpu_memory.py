"""Memory allocation of processes that compute on a CPU."""

import ctypes

# Options of glibc's `mallopt`, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def reuse_freed_memory() -> bool:
    """Makes this process keep freed memory for later tensors instead of returning it to the operating system.

    By default, glibc requests every large tensor from the kernel, which clears each page on its first use. With
    convolutions of few operations per value, this takes longer than the convolutions. Other C libraries have no such
    option.

    Returns:
        Whether the C library has the option.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS; Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
