"""The alert rules and the dashboard: each rule has its story, each expression parses, each metric of ours exists."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from operations_tools import ROOT, assert_command_exists, checked, commands_in, documents, tool
from prometheus_client import CollectorRegistry

from feedback.principals import KeyStore
from feedback.settings import FeedbackSettings
from serve.auth import Rates
from serve.metrics import Metrics
from train.rounds.worker_metrics import WorkerMetrics

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "instructloop.json"

(RULES,) = documents((PROMETHEUS / "alerts.yml").read_text())
ALERTS: list[dict[str, Any]] = [rule for group in RULES["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    targets = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return targets + [annotation["expr"] for annotation in board["annotations"]["list"]]


def own_metrics() -> set[str]:
    """Names of the samples that a server and a worker may show."""
    server = Metrics()
    Rates(KeyStore.connect("redis://127.0.0.1:1", FeedbackSettings()), server)
    return names_in(server.registry) | names_in(WorkerMetrics().registry)


def names_in(registry: CollectorRegistry) -> set[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "summary": ["_sum", "_count"]}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes.get(family.type, [""])}


def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    checked(tool("promtool"), "check", "rules", PROMETHEUS / "alerts.yml")
    checked(tool("promtool"), "check", "config", PROMETHEUS / "prometheus.yml")


def test_each_story_fires_what_it_should_and_nothing_else() -> None:
    checked(tool("promtool"), "test", "rules", PROMETHEUS / "tests.yml")


def test_each_rule_has_a_story_in_which_it_fires(tmp_path: Path) -> None:
    rules = copy.deepcopy(RULES)
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = "vector(1) > 2"
    (tmp_path / "alerts.yml").write_text(json.dumps(rules))
    (tmp_path / "tests.yml").write_text((PROMETHEUS / "tests.yml").read_text())
    with pytest.raises(AssertionError) as missed:
        checked(tool("promtool"), "test", "rules", tmp_path / "tests.yml")
    assert [alert["alert"] for alert in ALERTS if alert["alert"] not in str(missed.value)] == []


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert len(alert["annotations"]["summary"]) < 100
    for words in commands_in(alert["annotations"]["runbook"]):
        assert_command_exists(["99" if word == "N" else word for word in words])


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    (words,) = commands_in("say `python -m deploy rolback` at once")
    with pytest.raises(AssertionError, match="rolback"):
        assert_command_exists(words)


def test_rules_and_dashboard_name_only_metrics_that_exist() -> None:
    """Ours; vLLM's own are held against real engines in test_deploy_topology."""
    exist = own_metrics()
    for expression in [alert["expr"] for alert in ALERTS] + dashboard_expressions():
        named = set(re.findall(r"\binstructloop_\w+", expression))
        assert named <= exist, f"{sorted(named - exist)} in {expression}"


def test_the_dashboard_parses_and_covers_the_loop(tmp_path: Path) -> None:
    expressions = [re.sub(r"\$__(rate_)?interval", "5m", expression) for expression in dashboard_expressions()]
    rules = [{"record": f"panel:{place}", "expr": expression} for place, expression in enumerate(expressions)]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    checked(tool("promtool"), "check", "rules", tmp_path / "panels.yml")
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(set(ids)) == len(ids)
    unused = own_metrics() - set(re.findall(r"\binstructloop_\w+", " ".join(expressions)))
    shown_otherwise = re.compile(r"_(count|sum)$|prompt_tokens|engine_starts|worker_failures_total|worker_round_ended")
    assert {name for name in unused if not shown_otherwise.search(name)} == set()
