"""Prometheus metrics of the server. One instance per app, on its own registry."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from deploy.guard import Look

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _EngineMetrics(Collector):
    """The engines' own metrics, of which each has a family of every name, as one family of each name."""

    def __init__(self) -> None:
        self.registries: Callable[[], Iterable[CollectorRegistry]] = tuple

    def collect(self) -> Iterable[Metric]:
        """Families with the samples of all engines; their label ``model_name`` tells them apart."""
        families: dict[str, Metric] = {}
        for registry in self.registries():
            for family in registry.collect():
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += family.samples
        return families.values()


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
            buckets=_SECONDS,
        )
        self.completion_tokens = Counter(
            "instructloop_completion_tokens", "Sampled tokens", ["policy_version"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            "instructloop_prompt_tokens", "Prompt tokens", ["policy_version"], registry=self.registry
        )
        labels = ["object", "policy_version"]
        self.queue_seconds = Histogram(
            "instructloop_queue_seconds",
            "Seconds a prompt waited in the engine's queue",
            labels,
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.first_token_seconds = Histogram(
            "instructloop_first_token_seconds",
            "Seconds until a prompt's first token",
            labels,
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.inter_token_seconds = Histogram(
            "instructloop_inter_token_seconds",
            "Mean seconds between a completion's tokens",
            labels,
            registry=self.registry,
            buckets=_TOKEN_SECONDS,
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
        self.redis_durable = Gauge(
            "instructloop_redis_durable",
            "1 where Redis took a write with the durable settings when /ready last asked",
            registry=self.registry,
        )
        self.state_free_bytes = Gauge(
            "instructloop_state_free_bytes", "Free bytes where the state directory is", registry=self.registry
        )
        self.engine_starts = Counter(
            "instructloop_engine_starts", "Engines started, by outcome", ["outcome"], registry=self.registry
        )
        self.engine_restarts = Counter(
            "instructloop_engine_restarts",
            "Engines that were serving and had to be ended: died, hung, or gave garbage",
            ["reason"],
            registry=self.registry,
        )
        self.canary_comparisons = Gauge(
            "instructloop_canary_comparisons",
            "Blind comparisons without a tie of the canary with the stable version; 0 without a canary",
            registry=self.registry,
        )
        self.canary_wealth = Gauge(
            "instructloop_canary_wealth",
            "Evidence for each claim about the canary: better, not worse, worse; 20 decides (1/alpha)",
            ["claim"],
            registry=self.registry,
        )
        self.guard_actions = Counter(
            "instructloop_guard_actions",
            "Canaries this server promoted or rolled back without an operator",
            ["verb"],
            registry=self.registry,
        )
        self._engines = _EngineMetrics()
        self.registry.register(self._engines)

    def include_engines(self, registries: Callable[[], Iterable[CollectorRegistry]]) -> None:
        """Show vLLM's own metrics of the live engines on the same page."""
        self._engines.registries = registries

    def guarded(self, look: Look) -> None:
        """Show what a look at the canary found."""
        self.canary_comparisons.set(look.verdict.comparisons)
        self.canary_wealth.labels("better").set(look.verdict.wealth_better)
        self.canary_wealth.labels("not_worse").set(look.verdict.wealth_not_worse)
        self.canary_wealth.labels("worse").set(look.verdict.wealth_worse)
        if look.done is not None:
            self.guard_actions.labels(look.done.verb).inc()

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
