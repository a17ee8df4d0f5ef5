"""`a2gen doctor`: every check, on given values and on this installation; filters of known warnings."""

import io
import logging
import sys
import warnings
from importlib import metadata

import pytest
from rich.console import Console

from a2gen_rec.cli import doctor_checks
from a2gen_rec.utils.warning_filters import silence_known_warnings

pytestmark = pytest.mark.processes

GIB = 2**30


def test_supported_python_versions() -> None:
    status = {minor: doctor_checks.check_python((3, minor)).status for minor in (10, 11, 12, 13, 14)}
    assert status == {10: "fail", 11: "ok", 12: "ok", 13: "ok", 14: "fail"}
    assert doctor_checks.check_python((3, 10)).detail == "3.10; requires 3.11, 3.12 or 3.13"


@pytest.mark.parametrize(
    ("versions", "status", "reason"),
    [
        (("2.13.0+cpu", "1.8.0", "1.8.0"), "ok", "2.13.0+cpu"),
        (("2.13.1+cu130", "1.8.0+cu130", "1.8.0"), "ok", "1.8.0"),
        (("2.12.0", "1.7.0", "1.7.0"), "warn", "untested version (tested: 2.13 · 1.8 · 1.8.0)"),
        (("2.13.0", "1.8.0", "1.8.1"), "warn", "untested version"),
        (("2.13.0", "1.7.0", "1.8.0"), "fail", "torch 2.13 requires fbgemm 1.8 and torchrec 1.8.0"),
        (("2.14.0", "1.9.0", "1.8.0"), "fail", "torch 2.14 requires fbgemm 1.9 and torchrec 1.9.2"),
        (("2.10.0", "1.5.0", "1.5.0"), "fail", "no compatible fbgemm release is known for torch 2.10.0"),
        (("not-a-version", "1.8.0", "1.8.0"), "fail", "not-a-version"),
        (("2.13.0", None, None), "fail", "not installed: fbgemm, torchrec"),
    ],
)
def test_versions(versions: tuple[str | None, ...], status: str, reason: str) -> None:
    check = doctor_checks.check_versions(*versions)
    assert check.status == status
    assert reason in check.detail
    assert bool(check.fix) == (status != "ok")


@pytest.mark.parametrize(
    ("cuda", "fbgemm", "fbgemm_cpu", "status", "fix"),
    [
        (None, "1.8.0+cpu", "1.8.0", "ok", ""),
        (None, None, "1.8.0", "ok", ""),
        ("13.0", "1.8.0", None, "ok", ""),
        ("13.0", "1.8.0+cpu", "1.8.0", "warn", doctor_checks.REINSTALL_CUDA_COMMAND),
        (None, "1.8.0", None, "fail", doctor_checks.REINSTALL_COMMAND),
        (None, "1.8.0", "1.8.0", "fail", doctor_checks.REINSTALL_COMMAND),
        ("13.0", None, None, "fail", doctor_checks.REINSTALL_CUDA_COMMAND),
    ],
)
def test_builds(cuda: str | None, fbgemm: str | None, fbgemm_cpu: str | None, status: str, fix: str) -> None:
    check = doctor_checks.check_cuda_build(cuda, fbgemm, fbgemm_cpu)
    assert (check.status, check.fix) == (status, fix)


def test_requirements() -> None:
    required = ["torchmetrics==1.0.3", "duckdb>=1.1", "rich>=13", "absent", 'pytest>=8; extra == "dev"']
    versions = {"torchmetrics": "1.4.0", "duckdb": "1.2.0+local", "rich": "13.0"}
    checks = {check.name: check for check in doctor_checks.check_requirements(required, versions.get)}
    assert {name: check.status for name, check in checks.items()} == {
        "torchmetrics": "fail",
        "duckdb": "ok",
        "rich": "ok",
        "absent": "fail",
    }
    assert checks["torchmetrics"].fix == f"{sys.executable} -m pip install 'torchmetrics==1.0.3'"
    assert "1.4.0" in checks["torchmetrics"].detail


def test_requirements_of_the_installed_package() -> None:
    names = {check.name for check in doctor_checks._check_libraries(("torch",))}
    assert {"torchmetrics", "torchx", "iopath", "duckdb", "pyarrow"} <= names
    assert "torch" not in names
    assert "pytest" not in names


def test_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    (check,) = doctor_checks._check_libraries(())
    assert (check.status, check.fix) == ("fail", "make install")


def test_devices() -> None:
    detected = doctor_checks.check_devices("13.0", ["H200", "H200"], driver=True)
    assert (detected.status, detected.detail) == ("ok", "2 GPU: H200")
    assert doctor_checks.check_devices(None, [], driver=False).detail == "no GPU: CPU with gloo"
    wrong_build = doctor_checks.check_devices(None, [], driver=True)
    assert (wrong_build.status, wrong_build.fix) == ("warn", doctor_checks.REINSTALL_CUDA_COMMAND)
    undetected = doctor_checks.check_devices("13.0", [], driver=True)
    assert undetected.status == "warn"
    assert "nvidia-smi" in undetected.fix


@pytest.mark.parametrize(
    ("gloo", "nccl", "gpus", "status"),
    [(True, False, 0, "ok"), (True, True, 8, "ok"), (True, False, 8, "fail"), (False, True, 8, "fail")],
)
def test_backends(gloo: bool, nccl: bool, gpus: int, status: str) -> None:
    assert doctor_checks.check_backends(gloo, nccl, gpus).status == status


@pytest.mark.parametrize(
    ("value", "status"),
    [(None, "ok"), ("1", "ok"), ("4", "ok"), ("5", "warn"), ("0", "warn"), ("", "warn"), ("two", "warn")],
)
def test_threads(value: str | None, status: str) -> None:
    assert doctor_checks.check_threads(value, 4).status == status


def test_memory_and_shared_memory() -> None:
    assert doctor_checks.check_memory(3 * GIB).status == "warn"
    assert doctor_checks.check_memory(4 * GIB).status == "ok"
    assert doctor_checks.check_shared_memory(None).status == "warn"
    small = doctor_checks.check_shared_memory(64 * 2**20)
    assert small.status == "warn"
    assert small.detail.startswith("64 MiB")
    assert doctor_checks.check_shared_memory(GIB).status == "ok"


def test_smoke_test_results() -> None:
    assert doctor_checks.check_fbgemm_smoke_test(0, "").status == "ok"
    raised = doctor_checks.check_fbgemm_smoke_test(1, "Traceback …\nOSError: libtorch_cuda.so: cannot open\n\n")
    assert (raised.status, raised.detail) == ("fail", "OSError: libtorch_cuda.so: cannot open")
    crashed = doctor_checks.check_fbgemm_smoke_test(-11, "")
    assert crashed.status == "fail"
    assert "signal 11" in crashed.detail


def test_smoke_test_detects_wrong_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    doctor_checks.smoke_test_fbgemm()
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(RuntimeError, match="wrong sums"):
        doctor_checks.smoke_test_fbgemm()


def test_this_installation_passes() -> None:
    checks = doctor_checks.run_checks()
    assert [check for check in checks if check.status == "fail"] == []
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"Python", "Builds", "fbgemm lookup", "Devices", "Backends", "Threads", "Memory"} <= set(names)


def test_failures_and_table() -> None:
    passed = doctor_checks.Check("Python", "ok", "3.11")
    warned = doctor_checks.Check("Memory", "warn", "1 GiB", "buy")
    failed = doctor_checks.Check("torch", "fail", "absent", "pip install 'torch[extra]'")
    assert not doctor_checks.has_failures([passed, warned])
    assert doctor_checks.has_failures([passed, failed])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor_checks.checks_table([passed, warned, failed]))
    text = console.export_text()
    assert "pip install 'torch[extra]'" in text
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["ok", "warn", "fail"]


KNOWN = [
    (FutureWarning, "`broadcast_buffers` is deprecated. Use `forward_sync_buffers` instead."),
    (FutureWarning, "Please use DTensor instead and we are deprecating ShardedTensor."),
    (DeprecationWarning, "`torch.jit.script` is deprecated. Please switch to `torch.compile`."),
]
FX = "torch.fx._symbolic_trace"


def test_silences_only_known_warnings(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(FX)
    before = list(logger.filters)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        silence_known_warnings()
        silence_known_warnings()
        for category, message in KNOWN:
            warnings.warn(message, category, stacklevel=1)
        assert recorded == []
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("note: `broadcast_buffers` is deprecated", FutureWarning, stacklevel=1)
    assert len(recorded) == 2
    try:
        with caplog.at_level(logging.WARNING, logger=FX):
            logger.propagate = True
            logger.warning("is_fx_tracing will return true for both fx.symbolic_trace and torch.export.")
            logger.warning("graph break")
        assert [record.getMessage() for record in caplog.records] == ["graph break"]
        assert len(logger.filters) == len(before) + (1 if not before else 0)
    finally:
        for added_filter in set(logger.filters) - set(before):
            logger.removeFilter(added_filter)
