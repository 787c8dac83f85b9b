"""What `/metrics` says, in Prometheus' text form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nbinfer.contract.results import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from nbinfer.contract.results import EmbeddingResult, ImageResult, RerankResult
    from nbinfer.engines.protocol import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one served model.

    Parameters
    ----------
    engine
        Returns the engine, or None while it loads; asked at every scrape.
    """

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "nbinfer_requests", "Requests, by path and outcome.", ["path", "outcome"], registry=self._registry
        )
        self._seconds = Histogram(
            "nbinfer_request_seconds",
            "Seconds from submission to the end of an answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "nbinfer_first_token_seconds",
            "Seconds from submission to the first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(engine))

    def note(
        self, path: str, result: Result | EmbeddingResult | RerankResult | ImageResult, seconds: float
    ) -> None:
        """Count one answer."""
        self._requests.labels(path, "ok").inc()
        self._seconds.labels(path).observe(seconds)
        if isinstance(result, Result) and result.timings.first_token_seconds is not None:
            self._first.observe(result.timings.first_token_seconds)

    def note_failed(self, path: str) -> None:
        """Count one request that failed."""
        self._requests.labels(path, "error").inc()

    def note_cancelled(self, path: str) -> None:
        """Count one request whose client went away."""
        self._requests.labels(path, "cancelled").inc()

    def text(self) -> tuple[bytes, str]:
        """Return the page and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _EngineCollector(Collector):
    """Reads the engine's own counters when asked."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        if engine is None:
            return
        now, labels = engine.load(), [engine.info.model]
        for name, text, value in (
            ("nbinfer_running", "Requests that are being worked on.", now.running),
            ("nbinfer_waiting", "Requests that wait for a place.", now.waiting),
            ("nbinfer_context_used_tokens", "Tokens of context in use.", now.context_used),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            gauge.add_metric(labels, value)
            yield gauge
        for name, text, value in (
            ("nbinfer_generated_tokens", "Tokens generated.", now.tokens_generated),
            ("nbinfer_prompt_tokens", "Prompt tokens computed.", now.prompt_tokens),
            ("nbinfer_generated_images", "Images generated.", now.images_generated),
        ):
            counter = CounterMetricFamily(name, text, labels=["model"])
            counter.add_metric(labels, value)
            yield counter
