"""Prometheus metrics of the worker, on a port of its own; one instance per worker, on its own registry."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, start_http_server

from train.errors import TrainError
from train.rounds.backoff import Backoff
from train.rounds.runs import Outcome


class MetricsPortTaken(TrainError):
    """The metrics cannot be served where the settings say; the message names the place."""


class WorkerMetrics:
    """What a worker is doing. Labels are few and bounded: stages, their numbers' names, outcomes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.looked = Gauge(
            "instructloop_worker_looked_timestamp_seconds",
            "Unix time of the last look at the feedback log that succeeded",
            registry=self.registry,
        )
        self.waiting = Gauge(
            "instructloop_worker_waiting_comparisons",
            "Comparisons in the log that no round has had yet",
            registry=self.registry,
        )
        self.lease_held = Gauge(
            "instructloop_worker_lease_held", "1 while this worker holds the training lease", registry=self.registry
        )
        self.rounds = Counter(
            "instructloop_worker_rounds",
            "Rounds this worker has ended, by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self.round_ended = Gauge(
            "instructloop_worker_round_ended_timestamp_seconds",
            "Unix time at which the newest round ended, by its outcome; only the newest round's has a sample",
            ["outcome"],
            registry=self.registry,
        )
        self.failures = Counter(
            "instructloop_worker_failures",
            "Attempts at a round that failed, by what was raised",
            ["error"],
            registry=self.registry,
        )
        self.failures_in_a_row = Gauge(
            "instructloop_worker_failures_in_a_row", "Since the last round that did not fail", registry=self.registry
        )
        self.backoff_seconds = Gauge(
            "instructloop_worker_backoff_seconds",
            "Seconds that no round will begin for, because the last failed",
            registry=self.registry,
        )
        self.progress = Gauge(
            "instructloop_worker_stage_progress_ratio",
            "Part that is done of the stage under way; no sample while none is",
            ["stage"],
            registry=self.registry,
        )
        self.stage_seconds = Summary(
            "instructloop_worker_stage_seconds", "Seconds each stage took", ["stage"], registry=self.registry
        )
        self.numbers = Gauge(
            "instructloop_worker_stage_number",
            "The newest numbers of each stage of the newest round: losses, score, KL, accuracy",
            ["stage", "name"],
            registry=self.registry,
        )
        self._stage = ""
        self._stage_began = 0.0

    def show(self, backoff: Backoff) -> None:
        """Show a backoff as it goes on."""
        self.backoff_seconds.set_function(lambda: backoff.seconds_left)
        self.failures_in_a_row.set_function(lambda: backoff.failures)

    def __call__(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        """Take in one step, as a ``Progress``."""
        if stage != self._stage:
            self.end_stage()
            self._stage, self._stage_began = stage, time.monotonic()
        self.progress.labels(stage).set(done / total)
        for name, number in numbers.items():
            self.numbers.labels(stage, name).set(number)

    def end_stage(self, *, stopped: bool = False) -> None:
        """No stage is under way any more; one that was ``stopped`` does not count."""
        if self._stage and not stopped:
            self.stage_seconds.labels(self._stage).observe(time.monotonic() - self._stage_began)
        self.progress.clear()
        self._stage = ""

    def begin_round(self) -> None:
        """Numbers of the round before are not this one's."""
        self.numbers.clear()

    def ended(self, outcome: Outcome) -> None:
        """Take in how a round ended."""
        self.rounds.labels(outcome.status).inc()
        self.round_ended.clear()
        self.round_ended.labels(outcome.status).set_to_current_time()


@contextmanager
def served(metrics: WorkerMetrics, host: str, port: int) -> Iterator[None]:
    """Metrics are served at ``http://host:port/metrics`` inside; nowhere where ``port`` is 0.

    Raises MetricsPortTaken.
    """
    if port == 0:
        yield
        return
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise MetricsPortTaken(
            f"the metrics cannot be served on {host}:{port} ({error}); see train.worker.metrics_port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
