"""Checks of an installation and the command that fixes each problem (``a2gen doctor``).

Every ``check_*`` function takes plain values, so it can be tested on any machine; :func:`run_checks` collects the
values. torch is imported there only, and fbgemm only in a separate process: a mismatch of its binary interface may
kill the process that loads it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
from rich.markup import escape
from rich.table import Table

Status = Literal["ok", "warn", "fail"]

SUPPORTED_PYTHON = ((3, 11), (3, 12), (3, 13))
# Compatible releases of torch, fbgemm-gpu and torchrec.
COMPATIBLE_VERSIONS = (
    ("2.11", "1.6", "1.6.1"),
    ("2.12", "1.7", "1.7.0"),
    ("2.13", "1.8", "1.8.0"),
    ("2.14", "1.9", "1.9.2"),
)
TESTED_VERSIONS = COMPATIBLE_VERSIONS[2]
REINSTALL_COMMAND = "rm -rf .venv && make install"
REINSTALL_CUDA_COMMAND = f"{REINSTALL_COMMAND} CUDA=1"
_MIB = 2**20
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the checked property.
        status: Severity: ``ok``, ``warn`` or ``fail``.
        detail: Current state, and the problem if there is one.
        fix: Command that fixes the problem; empty if there is none.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def check_python(version: tuple[int, int]) -> Check:
    text = ".".join(map(str, version))
    if version in SUPPORTED_PYTHON:
        return Check("Python", "ok", text)
    return Check("Python", "fail", f"{text}; requires 3.11, 3.12 or 3.13", f"{REINSTALL_COMMAND} PYTHON=python3.11")


def _minor(version: str) -> str:
    try:
        return "{0.major}.{0.minor}".format(Version(version))
    except InvalidVersion:
        return version


def check_versions(torch: str | None, fbgemm: str | None, torchrec: str | None) -> Check:
    """Check that three installed versions (None: absent) are a row of :data:`COMPATIBLE_VERSIONS`."""
    name = "torch · fbgemm · torchrec"
    if torch is None or fbgemm is None or torchrec is None:
        versions = (("torch", torch), ("fbgemm", fbgemm), ("torchrec", torchrec))
        missing = ", ".join(package for package, version in versions if version is None)
        return Check(name, "fail", f"not installed: {missing}", REINSTALL_COMMAND)
    installed = f"{torch} · {fbgemm} · {torchrec}"
    row = next((row for row in COMPATIBLE_VERSIONS if row[0] == _minor(torch)), None)
    if row is None:
        detail = f"{installed}: no compatible fbgemm release is known for torch {torch}"
        return Check(name, "fail", detail, REINSTALL_COMMAND)
    if _minor(fbgemm) != row[1] or _minor(torchrec) != _minor(row[2]):
        detail = f"{installed}: torch {row[0]} requires fbgemm {row[1]} and torchrec {row[2]}"
        return Check(name, "fail", detail, REINSTALL_COMMAND)
    if row != TESTED_VERSIONS or Version(torchrec).public != row[2]:
        detail = f"{installed}: untested version (tested: {' · '.join(TESTED_VERSIONS)})"
        return Check(name, "warn", detail, REINSTALL_COMMAND)
    return Check(name, "ok", installed)


def check_cuda_build(torch_cuda: str | None, fbgemm: str | None, fbgemm_cpu: str | None) -> Check:
    """Check that torch and fbgemm are built for the same device.

    Args:
        torch_cuda: CUDA version of torch; None for a CPU build.
        fbgemm: Version of the distribution ``fbgemm-gpu``; ``+cpu`` marks the CPU build or our placeholder package.
        fbgemm_cpu: Version of the distribution ``fbgemm-gpu-cpu``.
    """
    name = "Builds"
    on_cpu = fbgemm_cpu is not None or (fbgemm or "").endswith("+cpu")
    on_cuda = fbgemm is not None and not fbgemm.endswith("+cpu")
    torch_build = f"torch for CUDA {torch_cuda}" if torch_cuda else "torch for CPU"
    fix = REINSTALL_CUDA_COMMAND if torch_cuda else REINSTALL_COMMAND
    if on_cpu and on_cuda:
        return Check(name, "fail", "fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files", fix)
    if not on_cpu and not on_cuda:
        return Check(name, "fail", f"{torch_build}, no fbgemm", fix)
    if on_cuda and not torch_cuda:
        return Check(name, "fail", f"{torch_build}, fbgemm for CUDA: it cannot be loaded", fix)
    if on_cpu and torch_cuda:
        return Check(name, "warn", f"{torch_build}, fbgemm for CPU: no tables on GPUs", fix)
    return Check(name, "ok", f"{torch_build}, fbgemm for {'CPU' if on_cpu else 'CUDA'}")


def check_requirements(required: Iterable[str], installed: Callable[[str], str | None]) -> list[Check]:
    """Check every requirement (PEP 508) except extras and requirements that do not apply to this machine.

    Args:
        required: Requirements of the package.
        installed: Function that returns the version of a distribution; None if it is absent.
    """
    checks = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        fix = f"{sys.executable} -m pip install '{requirement.name}{requirement.specifier}'"
        if version is None:
            checks.append(Check(requirement.name, "fail", "not installed", fix))
        elif not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version}; requires {requirement.specifier}"
            checks.append(Check(requirement.name, "fail", detail, fix))
        else:
            checks.append(Check(requirement.name, "ok", version))
    return checks


def check_devices(torch_cuda: str | None, gpus: Sequence[str], driver: bool) -> Check:
    """Check which devices are available: GPUs, or the CPU.

    Args:
        torch_cuda: CUDA version of torch; None for a CPU build.
        gpus: Names of the GPUs that torch detects.
        driver: Whether NVIDIA's driver is loaded, i.e. the machine has a GPU.
    """
    if gpus:
        return Check("Devices", "ok", f"{len(gpus)} GPU: {', '.join(sorted(set(gpus)))}")
    if driver and not torch_cuda:
        detail = "NVIDIA driver found, but torch is built for CPU: CPU with gloo"
        return Check("Devices", "warn", detail, REINSTALL_CUDA_COMMAND)
    if driver:
        detail = f"torch for CUDA {torch_cuda} detects no GPU through the NVIDIA driver: CPU with gloo"
        return Check("Devices", "warn", detail, "nvidia-smi  # compare its CUDA version with torch's")
    return Check("Devices", "ok", "no GPU: CPU with gloo")


def check_backends(gloo: bool, nccl: bool, gpus: int) -> Check:
    """Check the process group backends: gloo is always required, NCCL with GPUs."""
    state = f"gloo {'yes' if gloo else 'no'}, nccl {'yes' if nccl else 'no'}"
    if not gloo or (gpus and not nccl):
        missing = "gloo" if not gloo else "nccl, required with GPUs"
        return Check(
            "Backends", "fail", f"{state}: missing {missing}", REINSTALL_CUDA_COMMAND if gpus else REINSTALL_COMMAND
        )
    return Check("Backends", "ok", state)


def check_threads(omp_num_threads: str | None, cores: int) -> Check:
    if omp_num_threads is None:
        return Check("Threads", "ok", f"{cores} cores; OMP_NUM_THREADS is not set; each process will use all cores")
    state = f"{cores} cores, OMP_NUM_THREADS={omp_num_threads}"
    if not omp_num_threads.isdecimal() or not 1 <= int(omp_num_threads) <= cores:
        return Check("Threads", "warn", f"{state}: not between 1 and {cores}", "unset OMP_NUM_THREADS")
    return Check("Threads", "ok", state)


def check_memory(memory: int) -> Check:
    """Check the memory in bytes of the machine, or of the container if it is limited."""
    size = f"{memory / _GIB:.1f} GiB"
    if memory < 4 * _GIB:
        fix = "torchx run … -- --loader.max-impressions-per-batch 2048  # smaller batches"
        return Check("Memory", "warn", f"{size}: low for training", fix)
    return Check("Memory", "ok", size)


def check_shared_memory(size: int | None) -> Check:
    """Check the size of ``/dev/shm`` in bytes (None: absent), through which NCCL connects the GPUs of a host."""
    fix = "docker run --shm-size 8g …  # in a container"
    if size is None:
        return Check("Shared memory", "warn", "no /dev/shm: NCCL cannot exchange data between the GPUs of a host", fix)
    text = f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"
    if size < _GIB:
        return Check("Shared memory", "warn", f"{text} in /dev/shm: low for NCCL on several GPUs", fix)
    return Check("Shared memory", "ok", text)


def check_fbgemm_smoke_test(returncode: int, output: str) -> Check:
    """Check the exit of the process of :func:`smoke_test_fbgemm`; a negative code is the signal that killed it."""
    name = "fbgemm lookup"
    if returncode == 0:
        return Check(name, "ok", "smoke test passed")
    if returncode < 0:
        return Check(name, "fail", f"crashed with signal {-returncode}: incompatible binaries", REINSTALL_COMMAND)
    last_line = next((line for line in reversed(output.splitlines()) if line.strip()), "no message")
    return Check(name, "fail", last_line.strip(), REINSTALL_COMMAND)


def smoke_test_fbgemm() -> None:
    """Pool three rows of a small table with fbgemm on the CPU and compare with the known sums.

    Raises:
        RuntimeError: A sum is wrong. A broken installation may raise any other error.
    """
    import torch
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], pooling_mode=PoolingMode.SUM
    )
    weights = torch.arange(16, dtype=torch.float32).reshape(4, 4)
    table.split_embedding_weights()[0].copy_(weights)
    pooled = table(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 3]))
    expected = torch.stack([weights[0], weights[2] + weights[3]])
    if not torch.equal(pooled, expected):
        raise RuntimeError(f"wrong sums: {pooled.tolist()} instead of {expected.tolist()}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_libraries(stack: Iterable[str]) -> list[Check]:
    """Check the package's requirements, except ``stack``, which has a separate check."""
    try:
        required = metadata.requires("a2gen_rec") or []
    except metadata.PackageNotFoundError:
        return [Check("a2gen_rec", "fail", "not installed; only the source tree is available", "make install")]
    others = [line for line in required if Requirement(line).name not in set(stack)]
    return check_requirements(others, _installed)


def _check_lookup() -> Check:
    command = [sys.executable, "-c", "from a2gen_rec.cli.doctor_checks import smoke_test_fbgemm; smoke_test_fbgemm()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return Check("fbgemm lookup", "fail", "no result within 3 minutes", REINSTALL_COMMAND)
    return check_fbgemm_smoke_test(done.returncode, done.stderr)


def _check_torch(fbgemm: str | None, fbgemm_cpu: str | None) -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Check("torch", "fail", f"cannot be loaded: {error}", REINSTALL_COMMAND)]
    cuda = torch.version.cuda
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    distributed = torch.distributed.is_available()
    gloo = distributed and torch.distributed.is_gloo_available()
    nccl = distributed and torch.distributed.is_nccl_available()
    return [
        check_cuda_build(cuda, fbgemm, fbgemm_cpu),
        _check_lookup(),
        check_devices(cuda, gpus, driver=Path("/proc/driver/nvidia/version").exists()),
        check_backends(gloo, nccl, len(gpus)),
    ]


def _memory() -> int:
    """Return the bytes available to this process: the smaller of the machine's memory and the control group's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    text = limit_file.read_text().strip() if limit_file.exists() else "max"
    return min(machine, int(text)) if text.isdecimal() else machine


def _shared_memory() -> int | None:
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        return None
    return shm.f_frsize * shm.f_blocks


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_checks() -> list[Check]:
    """Check everything a training job needs. Takes a few seconds and changes nothing."""
    fbgemm, fbgemm_cpu = _installed("fbgemm-gpu"), _installed("fbgemm-gpu-cpu")
    return [
        check_python(sys.version_info[:2]),
        check_versions(_installed("torch"), fbgemm_cpu or fbgemm, _installed("torchrec")),
        *_check_torch(fbgemm, fbgemm_cpu),
        *_check_libraries(("torch", "fbgemm-gpu", "torchrec")),
        check_threads(os.environ.get("OMP_NUM_THREADS"), _cores()),
        check_memory(_memory()),
        check_shared_memory(_shared_memory()),
    ]


def has_failures(checks: Iterable[Check]) -> bool:
    """Return whether any problem prevents training."""
    return any(check.status == "fail" for check in checks)


def checks_table(checks: Iterable[Check]) -> Table:
    """Return a console table of checks: status, name, detail and fix."""
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, pad_edge=False)
    for header in ("", "check", "detail", "fix"):
        table.add_column(header, overflow="fold")
    for check in checks:
        status = f"[{colors[check.status]}]{check.status}[/]"
        table.add_row(status, check.name, escape(check.detail), escape(check.fix))
    return table
