"""Environment information recorded with benchmark and experiment results."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def collect_env(device: torch.device, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Return the machine, library versions and git revision; ``ignore`` as in :func:`git_revision`."""
    import fbgemm_gpu
    import torchrec

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git_revision(ignore),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "fbgemm_gpu": fbgemm_gpu.__version__,
    }


def git_revision(ignore: Sequence[str] = ()) -> str:
    """Return the checkout's commit, with ``-dirty`` if files differ from it; empty outside a checkout.

    Args:
        ignore: Paths from the top of the checkout whose changes do not make it dirty. Result files do not affect
            results, and the first of several would mark all later ones.
    """
    if not _git("ls-files", Path(__file__).name):
        return ""  # installed, possibly into another checkout
    revision = _git("describe", "--always", "--abbrev=10")
    excluded = [f":(top,exclude){path}" for path in ignore]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *excluded)
    return f"{revision}-dirty" if changed else revision


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
