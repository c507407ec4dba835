"""Memory of processes that compute on a CPU."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from pix2seq.cpu_memory import reuse_freed_memory
if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
def faults():
    for _ in range(5):
        torch.zeros(16 << 20)  # 64 MiB, larger than any block that glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_reused():
    """Counts how often the kernel provides a page."""

    def page_faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True).stdout)

    assert page_faults("reuse") < 100
    assert page_faults("default") > 100
