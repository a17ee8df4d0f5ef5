"""Prometheus metrics of the service."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Metrics of one service; identifiers of users or items are never labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.request_seconds = self._histogram("request_seconds", "request latency", "route", "status")
        self.queue_seconds = self._histogram("queue_seconds", "time spent in the ranking queue")
        self.batch_requests = self._histogram("batch_requests", "requests per batch", buckets=SIZE_BUCKETS)
        self.batch_candidates = self._histogram("batch_candidates", "candidates per batch", buckets=SIZE_BUCKETS)
        self.degraded_rankings = self._counter("degraded_rankings", "rankings served with a fallback", "kind")
        self.errors = self._counter("errors", "error responses by code", "code")
        self.impressions = self._counter("impressions", "impressions recorded")
        self.reloads = self._counter("reloads", "model reloads", "outcome")
        self.model = Gauge("a2gen_model", "model in service", ["version"], registry=self.registry)

    def add_gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed on every scrape."""
        Gauge(f"a2gen_{name}", description, registry=self.registry).set_function(value)

    def observe_batch(self, waits: list[float], candidates: int) -> None:
        """Record a batch with the queue times of its requests in seconds and its number of candidates."""
        self.batch_requests.observe(len(waits))
        self.batch_candidates.observe(candidates)
        for wait in waits:
            self.queue_seconds.observe(wait)

    def set_model_version(self, version: str) -> None:
        """Set the version of the model in service."""
        self.model.clear()
        self.model.labels(version).set(1)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"a2gen_{name}", description, labels, registry=self.registry)

    def _histogram(
        self, name: str, description: str, *labels: str, buckets: tuple[float, ...] = LATENCY_BUCKETS
    ) -> Histogram:
        return Histogram(f"a2gen_{name}", description, labels, registry=self.registry, buckets=buckets)
