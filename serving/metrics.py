"""Metrics in Prometheus' format: counters of requests, and the store's figures at each scrape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http import HTTPMethod
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = CONTENT_TYPE_LATEST
# callers must not be able to make labels
_METHODS = frozenset(HTTPMethod)


class Metrics:
    """One gateway's counters."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        names = ["method", "route", "status"]
        self._requests = Counter("raymem_requests", "Requests answered.", names, registry=self._registry)
        self._seconds = Histogram(
            "raymem_request_seconds", "Time from request to answer.", ["method", "route"], registry=self._registry
        )

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count one request under its route's template, so that bank names make no labels."""
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def render(self, stats: dict[str, Any]) -> bytes:
        """The text page, with the numbers in a store's `stats` as gauges."""
        figures = CollectorRegistry()
        figures.register(_Stats(stats))
        return generate_latest(self._registry) + generate_latest(figures)


class Counted:
    """ASGI middleware that counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.count(scope, status, time.perf_counter() - started)


class _Stats(Collector):
    def __init__(self, stats: dict[str, Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for number, shard in enumerate(self._stats.get("shards", [])):
            label = str(shard.get("shard", number))
            _gauges(families, "raymem_shard", {"shard": label}, shard)
            for bank, figures in shard.get("banks", {}).items():
                _gauges(families, "raymem_bank", {"shard": label, "bank": bank}, figures)
        yield from families.values()


def _gauges(
    families: dict[str, GaugeMetricFamily], prefix: str, labels: dict[str, str], figures: dict[str, Any]
) -> None:
    for name, value in figures.items():
        if isinstance(value, int | float):
            full = f"{prefix}_{name}"
            family = families.setdefault(full, GaugeMetricFamily(full, f"{name} of a store.", labels=list(labels)))
            family.add_metric(list(labels.values()), float(value))
        elif isinstance(value, dict) and name != "banks":
            _gauges(families, f"{prefix}_{name}", labels, value)
