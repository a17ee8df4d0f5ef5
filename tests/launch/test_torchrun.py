"""The launcher of ranks, with ranks that import no torch."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

PROGRAM = """
import os, signal, sys, time
from pathlib import Path

def stop(number, frame):
    print(f"rank {os.environ['RANK']} saves after signal {number}", flush=True)
    sys.exit(0)

signal.signal(signal.SIGINT, stop)
Path(f"ready-{os.environ['RANK']}").touch()
while len(list(Path().glob("ready-*"))) < 2:
    time.sleep(0.01)
Path("all-ready").touch()
time.sleep(60)
"""


def test_ranks_get_the_signal_and_may_finish(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "a2gen_rec.launch.torchrun", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
    with subprocess.Popen(
        [*command, "program.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        while not (tmp_path / "all-ready").exists():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGINT)
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    for rank in range(2):
        assert f"rank {rank} saves after signal {int(signal.SIGINT)}" in output
    assert "Traceback" not in output
