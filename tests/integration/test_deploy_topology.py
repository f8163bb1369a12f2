"""The topology of ``deploy/`` as processes: redis-server, two servers, a worker, and Prometheus with our rules.

A server is killed and comes back; the alert about it fires and resolves. The one thing changed in the rules is how long
Prometheus waits: a few seconds for minutes, so that the story fits into a test.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from operations_tools import ROOT, tool
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from running_server import RunningServer, free_port, publish_policy, start_server

from deploy.registry import Registry
from feedback.embedded import start_or_join
from feedback.store import DURABLE

pytestmark = [pytest.mark.engine, pytest.mark.topology]

PROMETHEUS = ROOT / "deploy" / "prometheus"
SCRAPE_SECONDS = 1


@dataclass
class Topology:
    """What runs."""

    servers: list[RunningServer]
    worker_port: int
    redis_url: str
    prometheus: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of Prometheus' HTTP API."""
        answer = httpx2.get(f"{self.prometheus}/api/v1/{path}", params=parameters, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[str]:
        """The values of an expression now."""
        return [one["value"][1] for one in self.ask("query", query=expression)["result"]]

    def up(self) -> dict[str, str]:
        """Which targets answer: "1" or "0" by job and address."""
        found = self.ask("query", query="up")["result"]
        return {f"{one['metric']['job']} {one['metric']['instance']}": one["value"][1] for one in found}

    def alerts(self, name: str) -> dict[str, str]:
        """The state of an alert, pending or firing, by the instance it is about."""
        found = [one for one in self.ask("alerts")["alerts"] if one["labels"]["alertname"] == name]
        return {one["labels"].get("instance", ""): one["state"] for one in found}


def configuration(directory: Path, ports: dict[str, list[int]]) -> Path:
    """Our own files, with addresses of this machine and short times."""
    settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    for job in settings["scrape_configs"]:
        (found,) = job.pop("dns_sd_configs")
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports[found["names"][0]]]}]
    rules = (PROMETHEUS / "alerts.yml").read_text()
    rules = re.sub(r"for: \d+m", "for: 2s", rules).replace("[2m]", "[8s]").replace("[5m]", "[8s]")
    (directory / "alerts.yml").write_text(rules)
    path = directory / "prometheus.yml"
    path.write_text(json.dumps(settings))
    return path


@contextmanager
def process(*command: str | Path, log: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    with log.open("wb") as out:
        started = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        started.terminate()
        started.wait(60)


@contextmanager
def durable_redis(state: Path) -> Iterator[str]:
    """URL of the machine's own redis-server over TCP, as in deploy/docker; of the embedded one where there is none."""
    installed = shutil.which("redis-server")
    if installed is None:
        with start_or_join(state) as embedded:
            yield embedded.url
        return
    port = free_port()
    durable = [part for name, value in DURABLE.items() for part in (f"--{name}", value)]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(state), *durable]
    with process(installed, *options, log=state / "redis.log"):
        url = f"redis://127.0.0.1:{port}/0"
        with Redis.from_url(url, retry=Retry(ConstantBackoff(0.1), 50)) as client:
            assert client.ping()
        yield url


def end(server: RunningServer) -> None:
    server.process.terminate()
    server.process.wait(60)


@pytest.fixture(scope="module")
def topology(byte_policy: Callable[[int], Path]) -> Iterator[Topology]:
    prometheus = tool("prometheus")
    state = Path(tempfile.mkdtemp(prefix="il-"))
    with ExitStack() as running:
        running.callback(shutil.rmtree, state)
        publish_policy(Registry(state), byte_policy(1))
        worker_port, prometheus_port = free_port(), free_port()
        url = running.enter_context(durable_redis(state))
        servers = [start_server(state, url, "--policy", "1")]
        running.callback(end, servers[0])
        servers.append(start_server(state, url))
        running.callback(lambda: end(servers[1]))
        environment = servers[0].environment | {"INSTRUCTLOOP_TRAIN__WORKER__METRICS_PORT": str(worker_port)}
        worker = [sys.executable, "-m", "train", "worker"]
        running.enter_context(process(*worker, log=state / "worker.log", environment=environment))
        ports = {"server": [int(server.url.rpartition(":")[2]) for server in servers], "worker": [worker_port]}
        running.enter_context(
            process(
                prometheus,
                f"--config.file={configuration(state, ports)}",
                f"--storage.tsdb.path={state / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{prometheus_port}",
                log=state / "prometheus.log",
            )
        )
        for server in servers:
            server.wait_ready()
        yield Topology(servers, worker_port, url, f"http://127.0.0.1:{prometheus_port}")


def until(holds: Callable[[], bool], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)


def test_everything_is_scraped_and_nothing_alarms(topology: Topology) -> None:
    until(lambda: list(topology.up().values()) == ["1", "1", "1"], 60)
    body = {"model": "policy", "prompt": "hello", "max_tokens": 2}
    for server in topology.servers:
        assert httpx2.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
    until(lambda: topology.values("instructloop_release_generation") == ["1", "1"], 20)
    until(lambda: topology.values("vllm:num_requests_running") == ["0", "0"], 20)
    until(lambda: topology.values('ALERTS{alertstate="firing"}') == [], 40)


def test_rules_and_dashboard_name_only_what_servers_and_worker_show(topology: Topology) -> None:
    shown = {one["metric"] for one in topology.ask("targets/metadata")}
    # The worker answers in the OpenMetrics format, where a counter's type is told without its suffix.
    shown |= {name + suffix for name in shown for suffix in ("_bucket", "_sum", "_count", "_total")}
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "instructloop.json").read_text())
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    expressions += [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    for expression in expressions:
        named = set(re.findall(r"\b(?:instructloop_|vllm:)\w+", expression))
        assert named <= shown, f"{sorted(named - shown)} in {expression}"
        topology.ask("query", query=re.sub(r"\$__(rate_)?interval", "1m", expression))


def test_panels_of_what_happened_are_not_empty(topology: Topology) -> None:
    """Labels that a panel selects by exist, too: completions are made."""
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "instructloop.json").read_text())
    never = re.compile("5..|429|feedback|restarts|worker_(stage|rounds)|uncounted|canary|guard")
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    wanted = [re.sub(r"\$__(rate_)?interval", "1m", one) for one in expressions if not never.search(one)]
    assert len(wanted) > 15

    def empty() -> list[str]:
        body = {"model": "policy", "prompt": "hello", "max_tokens": 2}
        for server in topology.servers:
            httpx2.post(f"{server.url}/v1/completions", json=body, timeout=30)
        return [expression for expression in wanted if not topology.values(expression)]

    until(lambda: empty() == [], 30)


def test_a_killed_server_is_told_of_until_it_is_back(topology: Topology) -> None:
    first, second = topology.servers
    address = second.url.removeprefix("http://")
    second.process.kill()
    second.process.wait()
    until(lambda: topology.alerts("ServerDown") == {address: "firing"}, 40)
    assert topology.alerts("NoServer") == {}
    assert httpx2.get(f"{first.url}/ready", timeout=10).status_code == 200
    # Started again where it was; a listener is all that the alert is about, the engine takes its time.
    topology.servers[1] = again = start_server(first.state, first.redis_url, "--port", address.rpartition(":")[2])
    again.url = second.url
    until(lambda: topology.alerts("ServerDown") == {}, 120)
    assert set(topology.up().values()) == {"1"}


def test_redis_that_is_not_durable_makes_servers_not_ready(topology: Topology) -> None:
    first = topology.servers[0]
    address = first.url.removeprefix("http://")

    with Redis.from_url(topology.redis_url) as client:
        client.config_set("appendfsync", "everysec")
        try:
            until(lambda: topology.alerts("ServerNotReady").get(address) == "firing", 60)
        finally:
            client.config_set("appendfsync", "always")
    until(lambda: address not in topology.alerts("ServerNotReady"), 60)
