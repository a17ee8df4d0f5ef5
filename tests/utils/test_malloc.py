"""Settings of the C library's allocator."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

from a2gen_rec.utils.malloc import retain_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc supports the setting")
def test_glibc_accepts_the_setting_repeatedly() -> None:
    assert retain_freed_memory()
    assert retain_freed_memory()


@pytest.mark.parametrize(("accepted", "expected"), [({-3, -1}, True), ({-3}, False), ({-1}, False)])
def test_both_thresholds_are_raised(accepted: set[int], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {}

    def mallopt(parameter: int, value: int) -> int:
        values[parameter] = value
        return int(parameter in accepted)

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert retain_freed_memory() is expected
    assert values[-3] == 32 * 2**20  # M_MMAP_THRESHOLD: larger buffers are returned immediately
    if expected:
        assert values[-1] > 10**9  # M_TRIM_THRESHOLD: maximum free memory at the top of the heap


def test_other_c_libraries_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not retain_freed_memory()
