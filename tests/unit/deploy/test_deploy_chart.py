"""The Helm chart: rendered by helm, held against Kubernetes' schemas, and against what the servers need."""

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from operations_tools import ROOT, assert_command_exists, checked, commands_in, documents, python_tools, tool

from deploy.settings import DeploySettings
from feedback.settings import FeedbackSettings, LoopSettings
from serve.settings import ServeSettings
from train.settings import TrainSettings

CHART = ROOT / "deploy" / "helm"
KUBERNETES = ("1.27", "1.37")
"""The oldest that Chart.yaml allows, and the newest whose schemas there are."""

Document = dict[str, Any]

EVERYTHING: Document = {
    "settings": {
        "serve": {"drain_seconds": 45, "max_model_len": 4096, "engine_arguments": ["--gpu-memory-utilization=0.8"]},
        "train": {"worker": {"interval_seconds": 3600, "canary_fraction": 0.1}, "ppo": {"policy_lr": 9e-6}},
        "deploy": {"gate": {"max_kl": 5}},
    },
    "state": {"storageClass": "shared"},
    "server": {
        "policy": "1",
        "autoscaling": {"enabled": True},
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "32Gi"}},
        "nodeSelector": {"accelerator": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"team": "product"}}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"team": "operations"}}}],
        "redis": [{"ipBlock": {"cidr": "10.1.2.3/32"}}],
    },
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
}
LEAST: Document = {
    "state": {"existingClaim": "mine"},
    "worker": {"enabled": False},
    "networkPolicy": {"enabled": False},
}


def render(values: Document, directory: Path) -> str:
    path = directory / "values.json"
    path.write_text(json.dumps(values))
    return checked(tool("helm"), "template", "loop", CHART, "--values", path)


@pytest.fixture(params=["default", "everything", "least"])
def rendered(request: pytest.FixtureRequest, tmp_path: Path) -> list[Document]:
    values = {"default": {}, "everything": EVERYTHING, "least": LEAST}[request.param]
    return documents(render(values, tmp_path))


@pytest.fixture
def everything(tmp_path: Path) -> list[Document]:
    return documents(render(EVERYTHING, tmp_path))


def of_kind(objects: list[Document], kind: str) -> dict[str, Document]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pods(objects: list[Document]) -> Iterator[Document]:
    for deployment in of_kind(objects, "Deployment").values():
        yield deployment["spec"]["template"]


def selects(selector: dict[str, str], pod: Document) -> bool:
    labels: dict[str, str] = pod["metadata"]["labels"]
    return selector.items() <= labels.items()


def test_helm_finds_nothing_to_object_to() -> None:
    checked(tool("helm"), "lint", "--strict", CHART)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_would_take_every_object(rendered: list[Document], version: str, tmp_path: Path) -> None:
    path = tmp_path / "objects.yaml"
    known = [one for one in rendered if "monitoring.coreos.com" not in one["apiVersion"]]
    path.write_text(yaml.safe_dump_all(known))
    check = (sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, path)
    checked(*check, environment=python_tools())
    path.write_text(path.read_text().replace("containers:", "contaners:"))
    with pytest.raises(AssertionError):
        checked(*check, environment=python_tools())


@pytest.mark.parametrize(
    "wrong",
    [
        {"server": {"repicas": 3}},
        {"image": {"tag": "latest"}},
        {"server": {"replicas": 0}},
        {"settings": {"sevre": {}}},
        {"state": {"size": "a lot"}},
        {"redis": {"existingSecret": ""}},
    ],
    ids=json.dumps,
)
def test_the_schema_refuses_values_that_mean_nothing(wrong: Document, tmp_path: Path) -> None:
    tool("helm")
    with pytest.raises(AssertionError, match="don't meet the specifications of the schema"):
        render(wrong, tmp_path)


def test_containers_are_restricted(rendered: list[Document]) -> None:
    """Kubernetes' own "restricted" pod security standard, and a file system that cannot be written."""
    for pod in pods(rendered):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not container["image"].endswith(":latest")
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/state", "/tmp", "/home/loop"} <= mounted
            assert {mount["name"] for mount in container["volumeMounts"]} <= {v["name"] for v in pod["spec"]["volumes"]}


def test_containers_run_commands_and_settings_that_exist(
    rendered: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settings,) = (one for name, one in of_kind(rendered, "ConfigMap").items() if name.endswith("-settings"))
    path = tmp_path / "instructloop.toml"
    path.write_text(settings["data"]["instructloop.toml"])
    for pod in pods(rendered):
        (container,) = pod["spec"]["containers"]
        assert_command_exists(container["args"])
        given = {one["name"]: one.get("value", "redis://somewhere:6379/0") for one in container["env"]}
        assert given.pop("INSTRUCTLOOP_SETTINGS") == "/etc/instructloop/instructloop.toml"
        for name, value in (given | {"INSTRUCTLOOP_SETTINGS": str(path)}).items():
            monkeypatch.setenv(name, value)
        loaded = [
            table.load() for table in (LoopSettings, ServeSettings, FeedbackSettings, TrainSettings, DeploySettings)
        ]
        assert isinstance(loaded[0], LoopSettings) and str(loaded[0].state) == "/state"


def test_settings_reach_the_programs_as_they_were_given(everything: list[Document]) -> None:
    text = of_kind(everything, "ConfigMap")["loop-instructloop-settings"]["data"]["instructloop.toml"]
    assert tomllib.loads(text) == EVERYTHING["settings"]


@pytest.mark.parametrize(("values", "drain_seconds"), [({}, ServeSettings().drain_seconds), (EVERYTHING, 45.0)])
def test_a_server_is_given_the_time_to_drain(values: Document, drain_seconds: float, tmp_path: Path) -> None:
    spec = of_kind(documents(render(values, tmp_path)), "Deployment")["loop-instructloop-server"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    _, before = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(before) + drain_seconds + 15
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    # What keeps all servers from being ready, as Redis does or a release that changes, must not empty the Service.
    assert probes == {
        "startupProbe": "/health",
        "livenessProbe": "/health",
        "readinessProbe": "/ready?only=completions",
    }


def test_a_worker_is_never_two_by_accident(everything: list[Document]) -> None:
    spec = of_kind(everything, "Deployment")["loop-instructloop-worker"]["spec"]
    assert spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}


def test_whatever_selects_pods_selects_the_right_ones(everything: list[Document]) -> None:
    server, worker = sorted(pods(everything), key=lambda pod: pod["metadata"]["labels"]["app.kubernetes.io/component"])
    for deployment in of_kind(everything, "Deployment").values():
        assert selects(deployment["spec"]["selector"]["matchLabels"], deployment["spec"]["template"])
    for kind in ("Service", "NetworkPolicy", "PodDisruptionBudget"):
        for name, one in of_kind(everything, kind).items():
            found = one["spec"].get("selector") or one["spec"]["podSelector"]
            chosen = [pod for pod in (server, worker) if selects(found.get("matchLabels", found), pod)]
            assert chosen == [server if name.endswith("-server") else worker], (kind, name)
    for service in of_kind(everything, "Service").values():
        (pod,) = (pod for pod in (server, worker) if selects(service["spec"]["selector"], pod))
        offered = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= offered
    (scaler,) = of_kind(everything, "HorizontalPodAutoscaler").values()
    assert scaler["spec"]["scaleTargetRef"]["name"] in of_kind(everything, "Deployment")
    assert "replicas" not in of_kind(everything, "Deployment")["loop-instructloop-server"]["spec"]


def test_the_network_lets_through_what_is_needed_and_no_more(everything: list[Document]) -> None:
    policies = of_kind(everything, "NetworkPolicy")
    server, worker = policies["loop-instructloop-server"]["spec"], policies["loop-instructloop-worker"]["spec"]
    given = EVERYTHING["networkPolicy"]
    assert server["ingress"] == [{"ports": [{"port": "http"}], "from": given["clients"] + given["monitoring"]}]
    assert worker["ingress"] == [{"ports": [{"port": "metrics"}], "from": given["monitoring"]}]
    for policy in (server, worker):
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert [[port["port"] for port in rule["ports"]] for rule in policy["egress"]] == [[53, 53], [6379]]
        assert policy["egress"][1]["to"] == given["redis"]


def test_a_network_that_keeps_prometheus_out_is_refused(tmp_path: Path) -> None:
    tool("helm")
    values: Document = {"networkPolicy": {"clients": [{"podSelector": {}}]}}
    render(values, tmp_path)
    with pytest.raises(AssertionError, match=r"networkPolicy\.monitoring who scrapes"):
        render(values | {"monitoring": {"enabled": True}}, tmp_path)


@pytest.mark.parametrize(
    ("server", "budgets"),
    [
        ({"replicas": 2}, 1),
        ({"replicas": 1}, 0),
        ({"replicas": 3, "minAvailable": 3}, 0),
        ({"replicas": 1, "autoscaling": {"enabled": True, "minReplicas": 2}}, 1),
        ({"replicas": 3, "autoscaling": {"enabled": True, "minReplicas": 1}}, 0),
    ],
    ids=json.dumps,
)
def test_no_budget_keeps_a_node_from_being_drained(server: Document, budgets: int, tmp_path: Path) -> None:
    found = of_kind(documents(render({"server": server}, tmp_path)), "PodDisruptionBudget")
    assert len(found) == budgets


def test_where_no_worker_runs_nobody_is_told_that_none_does(tmp_path: Path) -> None:
    def told(values: Document) -> list[str]:
        (rules,) = of_kind(documents(render(values, tmp_path)), "PrometheusRule").values()
        return [rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"]]

    both = told({"monitoring": {"enabled": True}})
    servers = told({"monitoring": {"enabled": True}, "worker": {"enabled": False}})
    ours = {"NoWorker", "WorkerBlind", "WorkerFailing", "WorkerStuck", "CandidatesRefused"}
    assert set(both) - set(servers) == ours and "NoServer" in servers


def test_monitors_and_rules_agree_about_the_jobs(everything: list[Document]) -> None:
    (monitor,) = of_kind(everything, "ServiceMonitor").values()
    services = of_kind(everything, "Service").values()
    jobs = {service["metadata"]["labels"][monitor["spec"]["jobLabel"]] for service in services}
    configuration = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert jobs == {job["job_name"] for job in configuration["scrape_configs"]}
    for service in services:
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
    assert scraped == {port["name"] for service in services for port in service["spec"]["ports"]}


def test_the_chart_carries_the_rules_and_the_dashboard_as_they_are(everything: list[Document]) -> None:
    (rules,) = of_kind(everything, "PrometheusRule").values()
    assert rules["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert rules["metadata"]["labels"]["release"] == "prometheus"
    board = of_kind(everything, "ConfigMap")["loop-instructloop-dashboard"]["data"]["instructloop.json"]
    assert board.strip() == (ROOT / "deploy" / "grafana" / "dashboards" / "instructloop.json").read_text().strip()


def test_the_notes_tell_commands_that_exist() -> None:
    notes = (CHART / "templates" / "NOTES.txt").read_text()
    told = list(commands_in(notes))
    assert len(told) == 3
    for words in told:
        assert_command_exists(words)


def test_values_describe_every_value() -> None:
    """What the schema allows and what the values file names are the same."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def leaves(properties: Document, prefix: str = "") -> set[str]:
        found = set()
        for name, one in properties.items():
            inner = one.get("properties")
            found |= leaves(inner, f"{prefix}{name}.") if inner and name != "resources" else {prefix + name}
        return found

    def named(tree: Document, prefix: str = "") -> set[str]:
        found = set()
        for name, one in tree.items():
            deeper = isinstance(one, dict) and one and name != "resources"
            found |= named(one, f"{prefix}{name}.") if deeper else {prefix + name}
        return found

    ours = {leaf for leaf in leaves(schema["properties"]) if not leaf.startswith(("settings.", "global"))}
    assert ours == named(values) - {"settings"}
