"""What a service tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Of one service: no identifier of a user or an item is ever a label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = self._histogram(
            "request_seconds", "from a request's first line to its answer", "route", "status"
        )
        self.batch_wait = self._histogram("batch_wait_seconds", "for which a request waited to be ranked")
        self.batch_requests = self._histogram("batch_requests", "requests ranked together", buckets=SIZE_BUCKETS)
        self.batch_candidates = self._histogram("batch_candidates", "candidates ranked together", buckets=SIZE_BUCKETS)
        self.fallbacks = self._counter("fallbacks", "rankings that had to make do", "kind")
        self.refused = self._counter("refused", "requests not answered as asked, by the error's code", "code")
        self.impressions = self._counter("impressions", "impressions recorded")
        self.reloads = self._counter("reloads", "models loaded again", "outcome")
        self.model = Gauge("a2gen_model", "the model in service", ["version"], registry=self.registry)

    def add_gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when Prometheus asks."""
        Gauge(f"a2gen_{name}", about, registry=self.registry).set_function(value)

    def observe_batch(self, waits: list[float], candidates: int) -> None:
        self.batch_requests.observe(len(waits))
        self.batch_candidates.observe(candidates)
        for wait in waits:
            self.batch_wait.observe(wait)

    def set_model_version(self, version: str) -> None:
        self.model.clear()
        self.model.labels(version).set(1)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"a2gen_{name}", about, labels, registry=self.registry)

    def _histogram(
        self, name: str, about: str, *labels: str, buckets: tuple[float, ...] = LATENCY_BUCKETS
    ) -> Histogram:
        return Histogram(f"a2gen_{name}", about, labels, registry=self.registry, buckets=buckets)
