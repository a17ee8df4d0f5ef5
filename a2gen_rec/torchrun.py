"""torchrun that lets its ranks finish when it is asked to stop.

torchrun itself passes SIGTERM or Ctrl-C on, waits, and then fails whatever the ranks did. Here the ranks get the
signal, save, and end, and torchrun's exit code is theirs: 0 when all could finish.

Use as torchrun: ``python -m a2gen_rec.torchrun --nproc_per_node 2 … -m -- a2gen_rec.cli train …``
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed import run


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _pass_on)
    run.main(["--signals_to_handle", "SIGHUP,SIGQUIT", *sys.argv[1:]])


def _pass_on(number: int, _: FrameType | None) -> None:
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            os.kill(int(child), number)


if __name__ == "__main__":
    main()
