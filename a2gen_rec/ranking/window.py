"""Query times and candidate files.

A request becomes one window whose targets are alternatives at the same query time. The history is encoded once, and the
factorized attention (METHODS §2.1) evaluates all candidates together.
"""

import time
from typing import TYPE_CHECKING

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths

if TYPE_CHECKING:
    from a2gen_rec.data.columns import WindowColumns


def read_candidates(file: str) -> list[str]:
    """Return the distinct raw item identifiers of a file, one per line, in order.

    Raises:
        UserError: The file cannot be read or contains no identifier.
    """
    lines = (line.strip() for line in paths.read_text(file).splitlines())
    candidates = list(dict.fromkeys(line for line in lines if line))
    if not candidates:
        raise UserError(f"{file}: no candidates; expected one raw item identifier per line")
    return candidates


def next_timestamp(history: "WindowColumns") -> int:
    """Return one second after the last end of one window's impressions, or the current time without any."""
    return int(history.end_ms.max()) + 1000 if len(history.ts_ms) else now_ms()


def now_ms() -> int:
    """Return the current time in milliseconds since 1970."""
    return int(time.time() * 1000)
