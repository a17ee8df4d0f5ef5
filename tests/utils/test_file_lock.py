"""Exclusive file locks: one owner at a time, released at any exit."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths
from a2gen_rec.utils.atomic_dir import atomic_output_dir
from a2gen_rec.utils.file_lock import exclusive_file_lock, lock_owner


def test_a_second_owner_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    with exclusive_file_lock(file):
        assert lock_owner(file) == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(BlockingIOError), exclusive_file_lock(file):
            pass
        assert lock_owner(file), "the refused process leaves the file alone"
    assert not list(tmp_path.iterdir())
    assert lock_owner(file) == ""
    Path(file).write_text("left by a killed process")
    with exclusive_file_lock(file):
        assert lock_owner(file).startswith("process ")


def test_reports_directories_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), exclusive_file_lock(str(tmp_path / "absent" / "lock")):
        pass


def _increment(file: str, counter: str, times: int) -> None:
    while times:
        try:
            with exclusive_file_lock(file):
                Path(counter).write_text(str(int(Path(counter).read_text()) + 1))
                times -= 1
        except BlockingIOError:
            continue


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    """Owners remove the file while others open it; no increment of the counter is lost."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_increment, args=(str(tmp_path / "lock"), str(counter), 200)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert counter.read_text() == "600"


def test_sigkill_releases_the_lock(tmp_path: Path) -> None:
    file = str(tmp_path / "lock")
    code = (
        "import sys, time\nfrom a2gen_rec.utils.file_lock import exclusive_file_lock\n"
        "with exclusive_file_lock(sys.argv[1]):\n    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError), exclusive_file_lock(file):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with exclusive_file_lock(file):
            pass


def test_output_written_by_another_process_is_kept(tmp_path: Path) -> None:
    """Two writers of one output directory: the second fails and moves nothing into the first's directory."""
    out = tmp_path / "out"

    def write_both() -> None:
        with atomic_output_dir(str(out)) as second, atomic_output_dir(str(out)) as first:
            (second / "file").write_text("second")
            (first / "file").write_text("first")

    with pytest.raises(UserError, match="out: output directory is not empty"):
        write_both()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/file"]
    assert (out / "file").read_text() == "first"


def test_moves_never_nest(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        paths.move_dir(str(tmp_path / "source"), str(tmp_path / "target"))
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]
