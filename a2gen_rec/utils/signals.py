"""Requests to stop a process by SIGINT or SIGTERM."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

REPEAT_S = 5.0
"""Signals of one kind within this time are one request: Slurm 22.05 sends SIGTERM twice, 7 to 13 ms apart, at a time
limit, and a launcher forwards the signals that the scheduler has also sent to its ranks."""

Handler = Callable[[int, FrameType | None], None]


def once_per_request(handler: Handler) -> Handler:
    """Return a handler that ignores repetitions of a signal within ``REPEAT_S`` seconds."""
    handled: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number not in handled or now - handled[number] >= REPEAT_S:
            handled[number] = now
            handler(number, frame)

    return handle


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield the list of signals that request a stop; a second request of a kind has the signal's usual effect."""
    received: list[int] = []
    previous_handlers: dict[int, Any] = {}

    def record(number: int, _: FrameType | None) -> None:
        if number in received:
            signal.signal(number, previous_handlers[number])
            os.kill(os.getpid(), number)
        received.append(number)

    handler = once_per_request(record)
    for number in (signal.SIGINT, signal.SIGTERM):
        previous_handlers[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for handled, previous in previous_handlers.items():
            signal.signal(handled, previous)
