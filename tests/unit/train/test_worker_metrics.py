"""The worker's metrics: names with units, few labels, and a page of their own."""

import socket

import httpx2
import pytest

from train.rounds.backoff import Backoff
from train.rounds.runs import Outcome
from train.rounds.worker_metrics import MetricsPortTaken, WorkerMetrics, served


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_a_round_as_a_scraper_sees_it() -> None:
    metrics, backoff, port = WorkerMetrics(), Backoff(1000.0, 5000.0), free_port()
    metrics.show(backoff)
    with served(metrics, "127.0.0.1", port):

        def page() -> dict[str, float]:
            lines = httpx2.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
            samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            return {name.removeprefix("instructloop_worker_"): float(value) for name, value in samples}

        metrics.begin_round()
        metrics("ppo", 1, 4, {"score": 0.25})
        found = page()
        assert found['stage_progress_ratio{stage="ppo"}'] == 0.25
        assert found['stage_number{name="score",stage="ppo"}'] == 0.25
        assert found["backoff_seconds"] == found["failures_in_a_row"] == 0

        metrics("evaluate", 1, 1, {})
        metrics.end_stage()
        metrics.ended(Outcome(status="failed"))
        backoff.failed()
        found = page()
        assert found['stage_seconds_count{stage="ppo"}'] == found['stage_seconds_count{stage="evaluate"}'] == 1
        assert not any(name.startswith("stage_progress_ratio") for name in found)
        assert found['rounds_total{outcome="failed"}'] == found["failures_in_a_row"] == 1
        assert 990 < found["backoff_seconds"] <= 1250

        metrics.ended(Outcome(status="passed"))
        metrics.begin_round()
        found = page()
        assert [name for name in found if name.startswith("round_ended")] == [
            'round_ended_timestamp_seconds{outcome="passed"}'
        ]
        assert not any(name.startswith("stage_number") for name in found), "the last round's numbers are not this one's"


def test_a_stage_that_was_stopped_does_not_count() -> None:
    metrics = WorkerMetrics()
    metrics("ppo", 1, 4, {})
    metrics.end_stage(stopped=True)
    assert metrics.registry.get_sample_value("instructloop_worker_stage_seconds_count", {"stage": "ppo"}) is None


def test_port_0_serves_nothing_and_a_taken_port_is_refused() -> None:
    with served(WorkerMetrics(), "127.0.0.1", 0):
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MetricsPortTaken, match=f"{port}.*metrics_port"), served(WorkerMetrics(), "127.0.0.1", port):
            pass
