import subprocess
import sys

import pytest

pytest.importorskip("resource")

# 16 MiB, allocated and freed 50 times: 4,096 pages each time, unless they are kept
FAULTS = """
import resource, numpy as np
from recsys_dist import cpu
if {kept}: cpu.configure(1)
def work():
    for _ in range(50): np.ones(1 << 21)[0]; np.ones(1 << 23)[0]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(kept: bool) -> int:
    return int(subprocess.check_output([sys.executable, "-c", FAULTS.format(kept=kept)]))


def test_freed_memory_is_used_again_without_page_faults():
    given_back, kept = page_faults(False), page_faults(True)
    assert kept < 1000 < given_back
