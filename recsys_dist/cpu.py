"""How processes that do arithmetic use this machine: training workers and serving replicas."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def configure(threads: int) -> None:
    """Use so many threads, and keep the memory that is freed for the next step or request.

    By default glibc gives large arrays back to the kernel and takes them anew, page by page: that was a
    fifth of a training step and nearly half of ranking for 32 requests. Without glibc it stays so.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
