"""What became of requests that were due at moments fixed beforehand, and what that tells of a service."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RANKED, REFUSED, EXPIRED, LOST = 200, 503, 504, 0
"""Statuses: of HTTP, and of a request that got no answer."""


@dataclass(frozen=True)
class Trace:
    """One row per request, in the order they were due.

    Attributes:
        due: when each was to be sent, seconds since the begin; ``sent``, ``answered``: when it was, of the same clock.
        status: of the answer.
        cpu_s: processor time that sending and receiving took.
    """

    due: np.ndarray
    sent: np.ndarray
    answered: np.ndarray
    status: np.ndarray
    cpu_s: float

    @classmethod
    def read(cls, file: Path) -> "Trace":
        with np.load(file) as arrays:
            rows = {name: arrays[name] for name in ("due", "sent", "answered", "status")}
            return cls(**rows, cpu_s=float(arrays["cpu_s"]))

    def write(self, file: Path) -> None:
        np.savez(file, due=self.due, sent=self.sent, answered=self.answered, status=self.status, cpu_s=self.cpu_s)

    def latency_ms(self, status: int = RANKED) -> np.ndarray:
        """From when requests were due, so that one that had to wait for the sender counts too."""
        return 1000 * (self.answered - self.due)[self.status == status]

    def within_ms(self, q: float) -> float | None:
        """In which ``q`` percent of all requests were ranked; infinite where so many were not, None without any."""
        if not len(self.status):
            return None
        share = self.share(RANKED)
        return percentile(self.latency_ms(), min(100.0, q / share)) if 100 * share >= q else math.inf

    @property
    def lag_ms(self) -> np.ndarray:
        """How late each request was sent: the sender's fault, not the service's."""
        return 1000 * (self.sent - self.due)

    def share(self, status: int) -> float:
        return float((self.status == status).mean()) if len(self.status) else 0.0

    @property
    def errors(self) -> int:
        """Answers that no caller should have to expect."""
        return int((~np.isin(self.status, (RANKED, REFUSED, EXPIRED))).sum())

    def ranked_per_s(self, seconds: float) -> float:
        """Rankings over the ``seconds`` of the load, or over the time until the last answer if that is longer."""
        return float((self.status == RANKED).sum()) / float(self.answered.max(initial=seconds))


def percentile(values: np.ndarray, q: float) -> float | None:
    """None where there are no values."""
    return float(np.percentile(values, q)) if len(values) else None


def recovery_s(trace: Trace, since: float, limit_ms: float, window_s: float = 0.5) -> float | None:
    """How long after ``since`` the first ``window_s`` begins in which all that is due is ranked within ``limit_ms``.

    Returns:
        seconds; None where there is no such window before the last request is due.
    """
    later = trace.due >= since
    late = (trace.status != RANKED) | (1000 * (trace.answered - trace.due) > limit_ms)
    begins = np.concatenate([[since], trace.due[later & late]])
    ends = np.append(begins[1:], trace.due[later].max(initial=since))
    well = np.flatnonzero(ends - begins >= window_s)
    return float(begins[well[0]] - since) if len(well) else None
