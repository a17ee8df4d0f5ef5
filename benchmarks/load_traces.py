"""Traces of scheduled requests, and the statistics of a service computed from them."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RANKED, REJECTED, EXPIRED, LOST = 200, 503, 504, 0
"""HTTP statuses, and the status of a request without a response."""


@dataclass(frozen=True)
class Trace:
    """One row per request, sorted by due time. All times are seconds since the start of the load.

    Attributes:
        due: scheduled times.
        sent: times of sending.
        answered: times of the responses.
        status: statuses of the responses.
        cpu_s: CPU seconds of the load generator.
    """

    due: np.ndarray
    sent: np.ndarray
    answered: np.ndarray
    status: np.ndarray
    cpu_s: float

    @classmethod
    def read(cls, file: Path) -> "Trace":
        """Read a trace."""
        with np.load(file) as arrays:
            rows = {name: arrays[name] for name in ("due", "sent", "answered", "status")}
            return cls(**rows, cpu_s=float(arrays["cpu_s"]))

    def write(self, file: Path) -> None:
        """Write a trace."""
        np.savez(file, due=self.due, sent=self.sent, answered=self.answered, status=self.status, cpu_s=self.cpu_s)

    def latency_ms(self, status: int = RANKED) -> np.ndarray:
        """Return latencies since the due time, so that delays of the load generator count too."""
        return 1000 * (self.answered - self.due)[self.status == status]

    def ranked_within_ms(self, q: float) -> float | None:
        """Return the latency within which ``q`` percent of all requests were ranked.

        It is infinite if fewer were ranked, and None without requests.
        """
        if not len(self.status):
            return None
        share = self.share(RANKED)
        return percentile(self.latency_ms(), min(100.0, q / share)) if 100 * share >= q else math.inf

    @property
    def lag_ms(self) -> np.ndarray:
        """Delays of sending, caused by the load generator and not by the service."""
        return 1000 * (self.sent - self.due)

    def share(self, status: int) -> float:
        """Return the fraction of requests with a status."""
        return float((self.status == status).mean()) if len(self.status) else 0.0

    @property
    def errors(self) -> int:
        """Number of responses other than rankings, rejections and timeouts."""
        return int((~np.isin(self.status, (RANKED, REJECTED, EXPIRED))).sum())

    def ranked_per_s(self, seconds: float) -> float:
        """Return rankings per second over ``seconds``, or until the last response if that is later."""
        return float((self.status == RANKED).sum()) / float(self.answered.max(initial=seconds))


def percentile(values: np.ndarray, q: float) -> float | None:
    """Return a percentile, or None without values."""
    return float(np.percentile(values, q)) if len(values) else None


def recovery_s(trace: Trace, since: float, limit_ms: float, window_s: float = 0.5) -> float | None:
    """Return the recovery time after ``since``.

    Recovery is the start of the first ``window_s`` in which every due request is ranked within ``limit_ms``.

    Returns:
        Seconds after ``since``; None without such a window before the last request is due.
    """
    later = trace.due >= since
    late = (trace.status != RANKED) | (1000 * (trace.answered - trace.due) > limit_ms)
    starts = np.concatenate([[since], trace.due[later & late]])
    ends = np.append(starts[1:], trace.due[later].max(initial=since))
    recovered = np.flatnonzero(ends - starts >= window_s)
    return float(starts[recovered[0]] - since) if len(recovered) else None
