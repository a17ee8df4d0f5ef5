"""A user's past and the candidates of a request as one window.

The window's targets are alternatives for one moment, so the history is read once and the factorized attention
(METHODS §2.1) answers for every candidate together.
"""

import time

from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths


def read_candidates(file: str) -> list[str]:
    """Raw item identifiers of a file, one a line, each once, in order.

    Raises:
        UserError: the file cannot be read or has no identifier.
    """
    names = (line.strip() for line in paths.read_text(file).splitlines())
    found = list(dict.fromkeys(name for name in names if name))
    if not found:
        raise UserError(f"{file}: no candidates; put one raw item identifier on each line")
    return found


def next_timestamp(history: WindowColumns) -> int:
    """A second after the last end of one window's impressions; now, without any."""
    return int(history.end_ms.max()) + 1000 if len(history.ts_ms) else now_ms()


def now_ms() -> int:
    """Now, milliseconds since 1970."""
    return int(time.time() * 1000)
