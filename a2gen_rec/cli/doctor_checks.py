"""Why an installation may not work, in words, and the command that mends each finding (``a2gen doctor``).

Every ``check_*`` takes plain facts and returns findings, so it can be tested without the machine it speaks of;
:func:`diagnose` gathers the facts. torch is imported there only, and fbgemm only in a process of its own: its
binary interface is strict, and a mismatch may kill the process that loads it.
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

SUPPORTED_PYTHON = ((3, 11), (3, 13))  # from the first, below the second
# torch, fbgemm-gpu, torchrec: releases whose binaries fit one another.
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
    """One thing looked at.

    Attributes:
        found: what is there, and what is wrong with it.
        mend: the command that mends it; empty when nothing needs to be.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def check_python(version: tuple[int, int]) -> Check:
    found = ".".join(map(str, version))
    if SUPPORTED_PYTHON[0] <= version < SUPPORTED_PYTHON[1]:
        return Check("Python", "ok", found)
    return Check("Python", "fail", f"{found}, needed is 3.11 or 3.12", f"{REINSTALL_COMMAND} PYTHON=python3.11")


def _minor(version: str) -> str:
    try:
        return "{0.major}.{0.minor}".format(Version(version))
    except InvalidVersion:
        return version


def check_versions(torch: str | None, fbgemm: str | None, torchrec: str | None) -> Check:
    """Whether three installed versions (None: absent) are a row of :data:`STACK`."""
    topic = "torch · fbgemm · torchrec"
    if torch is None or fbgemm is None or torchrec is None:
        named = (("torch", torch), ("fbgemm", fbgemm), ("torchrec", torchrec))
        missing = ", ".join(name for name, version in named if version is None)
        return Check(topic, "fail", f"not installed: {missing}", REINSTALL_COMMAND)
    found = f"{torch} · {fbgemm} · {torchrec}"
    row = next((row for row in COMPATIBLE_VERSIONS if row[0] == _minor(torch)), None)
    if row is None:
        return Check(topic, "fail", f"{found}: no release of fbgemm is known to fit torch {torch}", REINSTALL_COMMAND)
    if _minor(fbgemm) != row[1] or _minor(torchrec) != _minor(row[2]):
        needed = f"torch {row[0]} needs fbgemm {row[1]} and torchrec {row[2]}"
        return Check(topic, "fail", f"{found}: {needed}", REINSTALL_COMMAND)
    if row != TESTED_VERSIONS or Version(torchrec).public != row[2]:
        return Check(topic, "warn", f"{found}: should fit, tested is {' · '.join(TESTED_VERSIONS)}", REINSTALL_COMMAND)
    return Check(topic, "ok", found)


def check_cuda_build(torch_cuda: str | None, fbgemm: str | None, fbgemm_cpu: str | None) -> Check:
    """Whether torch and fbgemm are built for the same device.

    Args:
        torch_cuda: CUDA version of torch, None for a CPU build.
        fbgemm: version of the distribution ``fbgemm-gpu``; ``+cpu`` stands for the CPU build or our stand-in.
        fbgemm_cpu: version of the distribution ``fbgemm-gpu-cpu``.
    """
    topic = "Builds"
    on_cpu = fbgemm_cpu is not None or (fbgemm or "").endswith("+cpu")
    on_cuda = fbgemm is not None and not fbgemm.endswith("+cpu")
    torch_build = f"torch for CUDA {torch_cuda}" if torch_cuda else "torch for CPU"
    mend = REINSTALL_CUDA_COMMAND if torch_cuda else REINSTALL_COMMAND
    if on_cpu and on_cuda:
        return Check(topic, "fail", "fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files", mend)
    if not on_cpu and not on_cuda:
        return Check(topic, "fail", f"{torch_build}, no fbgemm", mend)
    if on_cuda and not torch_cuda:
        return Check(topic, "fail", f"{torch_build}, fbgemm for CUDA: it cannot be loaded", mend)
    if on_cpu and torch_cuda:
        return Check(topic, "warn", f"{torch_build}, fbgemm for CPU: no tables on GPUs", mend)
    return Check(topic, "ok", f"{torch_build}, fbgemm for {'CPU' if on_cpu else 'CUDA'}")


def check_requirements(required: Iterable[str], installed: Callable[[str], str | None]) -> list[Check]:
    """One finding per requirement (PEP 508), extras and those that do not apply to this machine left out.

    Args:
        installed: version of a distribution, None when it is absent.
    """
    findings = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        mend = f"{sys.executable} -m pip install '{requirement.name}{requirement.specifier}'"
        if version is None:
            findings.append(Check(requirement.name, "fail", "not installed", mend))
        elif not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, needed is {requirement.specifier}"
            findings.append(Check(requirement.name, "fail", found, mend))
        else:
            findings.append(Check(requirement.name, "ok", version))
    return findings


def check_devices(torch_cuda: str | None, gpus: Sequence[str], driver: bool) -> Check:
    """What trains: the GPUs torch sees by name, or the CPU.

    Args:
        driver: whether NVIDIA's driver is loaded, so that there is a GPU, seen or not.
    """
    if gpus:
        return Check("Devices", "ok", f"{len(gpus)} GPU: {', '.join(sorted(set(gpus)))}")
    if driver and not torch_cuda:
        found = "there is an NVIDIA driver, but torch is built for CPU: CPU with gloo"
        return Check("Devices", "warn", found, REINSTALL_CUDA_COMMAND)
    if driver:
        found = f"torch for CUDA {torch_cuda} sees no GPU through the NVIDIA driver: CPU with gloo"
        return Check("Devices", "warn", found, "nvidia-smi  # compare its CUDA version with torch's")
    return Check("Devices", "ok", "no GPU: CPU with gloo")


def check_backends(gloo: bool, nccl: bool, gpus: int) -> Check:
    """Whether the process groups this machine needs can be made: gloo always, NCCL with GPUs."""
    found = f"gloo {'yes' if gloo else 'no'}, nccl {'yes' if nccl else 'no'}"
    if not gloo or (gpus and not nccl):
        missing = "gloo" if not gloo else "nccl, which GPUs need"
        return Check(
            "Backends", "fail", f"{found}: missing {missing}", REINSTALL_CUDA_COMMAND if gpus else REINSTALL_COMMAND
        )
    return Check("Backends", "ok", found)


def check_threads(omp_num_threads: str | None, cores: int) -> Check:
    if omp_num_threads is None:
        return Check("Threads", "ok", f"{cores} cores, OMP_NUM_THREADS not set: one process takes them all")
    found = f"{cores} cores, OMP_NUM_THREADS={omp_num_threads}"
    if not omp_num_threads.isdecimal() or not 1 <= int(omp_num_threads) <= cores:
        return Check("Threads", "warn", f"{found}: not between 1 and {cores}", "unset OMP_NUM_THREADS")
    return Check("Threads", "ok", found)


def check_memory(memory: int) -> Check:
    """``memory`` in bytes: the machine's, or the container's bound."""
    found = f"{memory / _GIB:.1f} GiB"
    if memory < 4 * _GIB:
        mend = "torchx run … -- --loader.max_impressions_per_batch 2048  # smaller batches"
        return Check("Memory", "warn", f"{found}: little for training", mend)
    return Check("Memory", "ok", found)


def check_shared_memory(size: int | None) -> Check:
    """``size`` of ``/dev/shm`` in bytes, None where there is none. NCCL moves data between a host's GPUs through it."""
    mend = "docker run --shm-size 8g …  # in a container"
    if size is None:
        return Check("Shared memory", "warn", "no /dev/shm: NCCL cannot exchange data between a host's GPUs", mend)
    found = f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"
    if size < _GIB:
        return Check("Shared memory", "warn", f"{found} in /dev/shm: little for NCCL on several GPUs", mend)
    return Check("Shared memory", "ok", found)


def check_fbgemm_smoke_test(returncode: int, output: str) -> Check:
    """What became of the process that ran :func:`lookup`; a negative code is the signal that killed it."""
    topic = "fbgemm lookup"
    if returncode == 0:
        return Check(topic, "ok", "loads, and a small lookup is right")
    if returncode < 0:
        return Check(topic, "fail", f"crashed with signal {-returncode}: binaries do not fit", REINSTALL_COMMAND)
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no message")
    return Check(topic, "fail", last.strip(), REINSTALL_COMMAND)


def smoke_test_fbgemm() -> None:
    """Pool three rows of a small table with fbgemm on the CPU and compare with the known sums.

    Raises:
        RuntimeError: a sum is wrong. Whatever else a broken installation raises.
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


def _library_findings(stack: Iterable[str]) -> list[Check]:
    """The requirements this package was installed with, but for ``stack``, which has a check of its own."""
    try:
        required = metadata.requires("a2gen_rec") or []
    except metadata.PackageNotFoundError:
        return [Check("a2gen_rec", "fail", "not installed, only its source is here", "make install")]
    others = [line for line in required if Requirement(line).name not in set(stack)]
    return check_requirements(others, _installed)


def _lookup_finding() -> Check:
    command = [sys.executable, "-c", "from a2gen_rec.cli.doctor_checks import lookup; lookup()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return Check("fbgemm lookup", "fail", "no answer in 3 minutes", REINSTALL_COMMAND)
    return check_fbgemm_smoke_test(done.returncode, done.stderr)


def _torch_findings(fbgemm: str | None, fbgemm_cpu: str | None) -> list[Check]:
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
        _lookup_finding(),
        check_devices(cuda, gpus, driver=Path("/proc/driver/nvidia/version").exists()),
        check_backends(gloo, nccl, len(gpus)),
    ]


def _memory() -> int:
    """Bytes this process may use: the machine's memory or the control group's bound, whichever is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bound = Path("/sys/fs/cgroup/memory.max")
    text = bound.read_text().strip() if bound.exists() else "max"
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
    """Look at everything a training job needs. Takes some seconds and changes nothing."""
    fbgemm, fbgemm_cpu = _installed("fbgemm-gpu"), _installed("fbgemm-gpu-cpu")
    return [
        check_python(sys.version_info[:2]),
        check_versions(_installed("torch"), fbgemm_cpu or fbgemm, _installed("torchrec")),
        *_torch_findings(fbgemm, fbgemm_cpu),
        *_library_findings(("torch", "fbgemm-gpu", "torchrec")),
        check_threads(os.environ.get("OMP_NUM_THREADS"), _cores()),
        check_memory(_memory()),
        check_shared_memory(_shared_memory()),
    ]


def has_failures(findings: Iterable[Check]) -> bool:
    """Whether something must be mended before training can work."""
    return any(finding.status == "fail" for finding in findings)


def checks_table(findings: Iterable[Check]) -> Table:
    """A table for the terminal: what was looked at, what was found, and what mends it."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, pad_edge=False)
    for header in ("", "topic", "found", "mend with"):
        table.add_column(header, overflow="fold")
    for finding in findings:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(status, finding.name, escape(finding.detail), escape(finding.fix))
    return table
