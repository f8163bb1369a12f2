"""Prometheus metrics of the server. One instance per app, on its own registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """What is counted. Labels are few and bounded: route templates, status codes, version numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "instructloop_requests",
            "Answers by route, status and policy version",
            ["route", "status", "policy_version"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "instructloop_request_seconds",
            "Seconds from request to the end of the answer",
            ["route"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        self.completion_tokens = Counter(
            "instructloop_completion_tokens", "Sampled tokens", ["policy_version"], registry=self.registry
        )
        self.recorded = Counter("instructloop_recorded", "Completions kept for feedback", registry=self.registry)
        self.unrecorded = Counter(
            "instructloop_unrecorded", "Completions served but not kept: Redis away too long", registry=self.registry
        )
        self.feedback = Counter(
            "instructloop_feedback", "Feedback records acknowledged", ["kind"], registry=self.registry
        )
        self.release_generation = Gauge(
            "instructloop_release_generation", "Generation of the release being served", registry=self.registry
        )
        self.engine_starts = Counter(
            "instructloop_engine_starts", "Engines started, by outcome", ["outcome"], registry=self.registry
        )

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
