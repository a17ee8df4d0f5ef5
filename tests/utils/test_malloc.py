"""What the process asks of the C library."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

from a2gen_rec.utils.malloc import retain_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_glibc_takes_the_setting_again_and_again() -> None:
    assert retain_freed_memory()
    assert retain_freed_memory()


@pytest.mark.parametrize(("taken", "kept"), [({-3, -1}, True), ({-3}, False), ({-1}, False)])
def test_both_thresholds_are_raised(taken: set[int], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def mallopt(parameter: int, value: int) -> int:
        asked[parameter] = value
        return int(parameter in taken)

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert retain_freed_memory() is kept
    assert asked[-3] == 32 * 2**20  # M_MMAP_THRESHOLD: from that size on, buffers go back at once
    if kept:
        assert asked[-1] > 10**9  # M_TRIM_THRESHOLD: what may lie free at the top of the heap


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not retain_freed_memory()
