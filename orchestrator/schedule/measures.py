"""What a service measures of itself while it runs, for /metrics. Each service has its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Measures:
    """Counts since the service started, as Prometheus expects of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.decisions = self._seconds("decision", "One round of decisions, with what it starts.")
        self.ray = self._seconds("ray", "One look at the jobs and the nodes of the Ray cluster.")
        self.attempts = Counter(
            "maskray_attempts",
            "Attempts that ended, by the class of their error; `none` is a result.",
            ["error_class"],
            registry=self.registry,
        )

    def _seconds(self, name: str, words: str) -> Histogram:
        name = f"maskray_{name}_seconds"
        return Histogram(name, words, buckets=_SECONDS, registry=self.registry)
