"""torchrun that lets its ranks finish after SIGTERM or Ctrl-C.

torchrun itself forwards the signal, waits, and then fails regardless of the ranks' exit codes. Here the ranks get the
signal, save a checkpoint and exit, and torchrun's exit code follows theirs: 0 if all ranks finished.

Use as torchrun: ``python -m a2gen_rec.launch.torchrun --nproc_per_node 2 … -m -- a2gen_rec.cli train …``
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _forward_signal)
    try:
        run.main(["--signals_to_handle", "SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
        sys.exit(1)


def _forward_signal(number: int, _: FrameType | None) -> None:
    ranks = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    if not ranks:  # no rank has started, or the kernel does not list children: use the default action
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, number)


if __name__ == "__main__":
    main()
