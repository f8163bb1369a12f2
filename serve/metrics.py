"""Prometheus metrics of the server. One instance per app, on its own registry."""

from collections.abc import Callable, Iterable
from functools import partial

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


class CanaryMetrics:
    """What is known of the canary, and what was done about it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._comparisons = Gauge(
            "instructloop_canary_comparisons",
            "Blind comparisons without a tie of the canary with the stable version; 0 without a canary",
            registry=registry,
        )
        self._wealth = Gauge(
            "instructloop_canary_wealth",
            "Evidence for each claim about the canary: better, not worse, worse; 20 decides (1/alpha)",
            ["claim"],
            registry=registry,
        )
        self._actions = Counter(
            "instructloop_guard_actions",
            "Canaries this server promoted or rolled back without an operator",
            ["verb"],
            registry=registry,
        )

    def show(self, look: Look) -> None:
        """What a look at the canary found."""
        self._comparisons.set(look.verdict.comparisons)
        self._wealth.labels("better").set(look.verdict.wealth_better)
        self._wealth.labels("not_worse").set(look.verdict.wealth_not_worse)
        self._wealth.labels("worse").set(look.verdict.wealth_worse)
        if look.done is not None:
            self._actions.labels(look.done.verb).inc()


class Metrics:
    """What is counted. Labels are few and bounded: route templates, status codes, version numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=_SECONDS)
        version, sampled = ["policy_version"], ["object", "policy_version"]
        self.requests = counter(
            "instructloop_requests", "Answers by route, status and policy version", ["route", "status", *version]
        )
        self.request_seconds = histogram(
            "instructloop_request_seconds", "Seconds from request to the end of the answer", ["route"]
        )
        self.completion_tokens = counter("instructloop_completion_tokens", "Sampled tokens", version)
        self.prompt_tokens = counter("instructloop_prompt_tokens", "Prompt tokens", version)
        self.queue_seconds = histogram(
            "instructloop_queue_seconds", "Seconds a prompt waited in the engine's queue", sampled
        )
        self.first_token_seconds = histogram(
            "instructloop_first_token_seconds", "Seconds until a prompt's first token", sampled
        )
        self.inter_token_seconds = histogram(
            "instructloop_inter_token_seconds",
            "Mean seconds between a completion's tokens",
            sampled,
            buckets=_TOKEN_SECONDS,
        )
        self.recorded = counter("instructloop_recorded", "Completions kept for feedback")
        self.unrecorded = counter("instructloop_unrecorded", "Completions served but not kept: Redis away too long")
        self.feedback = counter("instructloop_feedback", "Feedback records acknowledged", ["kind"])
        self.release_generation = gauge("instructloop_release_generation", "Generation of the release being served")
        self.ready = gauge("instructloop_ready", "1 where /ready answers 200")
        self.redis_durable = gauge("instructloop_redis_durable", "1 where Redis takes writes with the durable settings")
        self.state_free_bytes = gauge("instructloop_state_free_bytes", "Free bytes where the state directory is")
        self.engine_starts = counter("instructloop_engine_starts", "Engines started, by outcome", ["outcome"])
        self.engine_restarts = counter(
            "instructloop_engine_restarts",
            "Engines that were serving and had to be ended: died, hung, or gave garbage",
            ["reason"],
        )
        self.canary = CanaryMetrics(self.registry)
        self._engines = _EngineMetrics()
        self.registry.register(self._engines)

    def include_engines(self, registries: Callable[[], Iterable[CollectorRegistry]]) -> None:
        """Show vLLM's own metrics of the live engines on the same page."""
        self._engines.registries = registries

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
