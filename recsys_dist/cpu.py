"""How processes that do arithmetic use this machine: training workers and serving replicas."""

import ctypes
import re
from pathlib import Path

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


def slow_between_avx_and_sse() -> bool:
    """Whether this is one of Intel's cores since Golden Cove, told by AVX-VNNI, which came with them."""
    told = Path("/proc/cpuinfo").read_text()
    return "GenuineIntel" in told and re.search(r"\bavx_vnni\b", told) is not None


def peak_bytes() -> int:
    """The most that was resident of this process so far, with what it shares (`VmHWM`, see proc(5))."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "only Linux keeps count"
    return int(found[1]) * 1024
