"""Requests to stop: repetitions within seconds are one request, a later one has the usual effect."""

import os
import signal

import pytest

from a2gen_rec.utils import signals
from a2gen_rec.utils.signals import once_per_request, stop_requests


def test_repeated_signals_are_one_request() -> None:
    with stop_requests() as received:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]


def test_a_later_signal_has_its_usual_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_S", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check_second_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)


def check_second_interrupt() -> None:
    with stop_requests() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_signals_of_other_kinds_are_other_requests() -> None:
    handled: list[int] = []
    handler = once_per_request(lambda number, _: handled.append(number))
    for number in (15, 15, 2, 15, 2):
        handler(number, None)
    assert handled == [15, 2]
