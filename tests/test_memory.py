"""What the process asks of the C library."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from a2gen_rec.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(2**21).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    some = [torch.ones(2**22) for _ in range(4)]  # 16 MiB each, freed together
    del some
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_buffers_cost_no_page_faults_again() -> None:
    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < 0.75 * faults("return")
