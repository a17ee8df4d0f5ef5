"""Where and with what figures were made, as they are to say beside them."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def collect_env(device: torch.device, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Facts of this machine, its libraries and the checkout; ``written`` as :func:`commit` takes."""
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
    """The checkout's commit, marked where its files differ from it; empty outside one.

    Args:
        written: files and folders, from the checkout's top, whose changes do not mark it: results change no figure,
            and the first of several would mark all that follow.
    """
    if not _git("ls-files", Path(__file__).name):
        return ""  # installed, maybe into a folder of another checkout
    found = _git("describe", "--always", "--abbrev=10")
    but = [f":(top,exclude){place}" for place in ignore]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *but)
    return f"{found}-dirty" if changed else found


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
