"""The image and the compose file, as far as they can be checked without a docker engine."""

import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from operations_tools import ROOT, assert_command_exists, checked, python_tools, tool

from deploy.settings import DeploySettings
from feedback.settings import FeedbackSettings, LoopSettings, SettingsError
from feedback.store import DURABLE
from serve.settings import ServeSettings
from train.settings import TrainSettings

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("server", "worker")

_LINES = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
INSTRUCTIONS = [(word, rest) for word, _, rest in (line.partition(" ") for line in _LINES) if word]


def stage(name: str) -> list[tuple[str, str]]:
    """The instructions of a build stage, without those of the stages it is from."""
    starts = [place for place, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM"]
    for start, end in zip(starts, [*starts[1:], len(INSTRUCTIONS)], strict=True):
        if INSTRUCTIONS[start][1].endswith(f" AS {name}"):
            return INSTRUCTIONS[start:end]
    raise AssertionError(f"there is no stage {name}")


def test_hadolint_has_nothing_to_say() -> None:
    checked(tool("hadolint"), "--failure-threshold", "style", DOCKER / "Dockerfile")


def test_every_image_has_a_fixed_tag() -> None:
    bases = [rest.split()[0] for word, rest in INSTRUCTIONS if word == "FROM"]
    outside = [base for base in bases if base not in {"system", "locked", "cpu-packages", "gpu-packages"}]
    for image in outside + [service["image"] for service in SERVICES.values()]:
        assert re.fullmatch(r"[a-z/]+:[a-z0-9][\w.-]+", image) and not image.endswith(":latest"), image


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_image_runs_as_nobody_and_says_whether_it_is_well(target: str) -> None:
    last = dict(stage(target))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert "/health" in last["HEALTHCHECK"]
    assert_command_exists([*json.loads(last["ENTRYPOINT"])[2:], *json.loads(last["CMD"])])
    assert json.loads(last["ENTRYPOINT"]) == ["python", "-m"]


def test_the_two_targets_differ_in_their_packages_only() -> None:
    assert stage("cpu")[1:] == stage("gpu")[1:]
    assert stage("cpu-packages")[1][1].replace("cpu", "gpu") == stage("gpu-packages")[1][1]


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    patterns = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()

    def sent(path: Path) -> bool:
        kept = False
        for pattern in (line for line in patterns if line and not line.startswith("#")):
            bare = pattern.removeprefix("!").removeprefix("**/")
            names = [str(path), *(str(parent) for parent in path.parents), path.name]
            if any(fnmatch(name, bare) for name in names):
                kept = pattern.startswith("!")
        return kept

    sources = [source for word, rest in INSTRUCTIONS if word == "COPY" for source in rest.split()[:-1]]
    assert {"serve", "train", "feedback", "deploy", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert sent(Path(source)), f"{source} is not sent to the builder"
    assert sent(Path("feedback/append.lua")) and sent(Path("serve/pages/index.html"))
    for private in ("state/redis/appendonly.aof", "instructloop.toml", ".git/config", ".venv/bin/python", "tests/x.py"):
        assert not sent(Path(private)), private


def test_the_empty_packages_are_those_of_pyproject() -> None:
    """The editable install is made before the source is there."""
    made = re.search(r"for package in ([\w /\\\n]+); do", DOCKERFILE)
    packages = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert made and packages
    assert {name.replace("/", ".") for name in made[1].replace("\\", "").split()} == set(json.loads(packages[1]))


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_accepts_the_file(name: str, tmp_path: Path) -> None:
    """After YAML's merge keys, which the checker does not resolve."""
    environment = python_tools()
    flat = tmp_path / "compose.json"
    flat.write_text(json.dumps(yaml.safe_load((DOCKER / name).read_text())))
    check = "import compose_spec, pathlib, sys; compose_spec.PyCompose.from_json(pathlib.Path(sys.argv[1]).read_text())"
    checked(sys.executable, "-c", check, flat, environment=environment)
    flat.write_text(flat.read_text().replace('"image"', '"imaeg"'))
    with pytest.raises(AssertionError, match="imaeg"):
        checked(sys.executable, "-c", check, flat, environment=environment)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_says_whether_it_is_well_and_comes_back(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"
    for port in SERVICES[name].get("ports", []):  # nothing is offered beyond this machine
        assert (port["host_ip"] if isinstance(port, dict) else port.rsplit(":", 2)[0]) == "127.0.0.1"
    for other in SERVICES[name].get("depends_on", {}):
        assert other in SERVICES
    for network in SERVICES[name]["networks"]:
        assert network in COMPOSE["networks"]


def test_redis_is_durable_and_reached_by_ours_only() -> None:
    command = SERVICES["redis"]["command"]
    given = {command[place].removeprefix("--"): command[place + 1] for place in range(1, len(command), 2)}
    assert given.items() >= DURABLE.items()
    assert COMPOSE["networks"]["store"]["internal"] is True
    assert {name for name, service in SERVICES.items() if "store" in service["networks"]} == {"redis", *OURS}


def test_servers_and_worker_share_one_state_and_may_do_little() -> None:
    assert SERVICES["server"]["deploy"]["replicas"] == 2
    for name in OURS:
        service = SERVICES[name]
        assert "state:/state" in service["volumes"]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert_command_exists(service["command"])
    assert set(GPU["services"]) == set(OURS)


def test_a_server_is_given_the_time_to_drain() -> None:
    assert int(SERVICES["server"]["stop_grace_period"].removesuffix("s")) >= ServeSettings().drain_seconds + 15


def test_the_environment_names_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(re.findall(r"\b(INSTRUCTLOOP_\w+)=(\S+)", DOCKERFILE))
    for service in [*SERVICES.values(), *GPU["services"].values()]:
        given |= {name: value for name, value in service.get("environment", {}).items() if name.startswith("INSTRUCT")}
    assert {"INSTRUCTLOOP_STATE", "INSTRUCTLOOP_REDIS_URL"} <= set(given)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    loop = LoopSettings.load()
    assert str(loop.state) == "/state" and loop.redis_url == "redis://redis:6379/0"
    for settings in (ServeSettings, FeedbackSettings, TrainSettings, DeploySettings):
        settings.load()
    top_level = {name for name in given if "__" not in name}
    assert top_level <= {f"INSTRUCTLOOP_{field.upper()}" for field in LoopSettings.model_fields}
    worker = TrainSettings.load().worker
    assert f":{worker.metrics_port}/metrics" in SERVICES["worker"]["healthcheck"]["test"][-1]
    monkeypatch.setenv("INSTRUCTLOOP_SERVE__DTPYE", "bfloat16")
    with pytest.raises(SettingsError, match="dtpye"):
        ServeSettings.load()


def test_the_first_lines_tell_commands_that_parse() -> None:
    comment = "\n".join(line for line in (DOCKER / "compose.yaml").read_text().splitlines() if line.startswith("#"))
    commands = re.findall(r"compose run --rm worker ([^#\n]*)", comment)
    assert len(commands) == 3
    for command in commands:
        assert_command_exists(command.split())


def test_prometheus_scrapes_the_services_where_they_listen() -> None:
    configuration = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    scraped = {
        found["names"][0]: found["port"] for job in configuration["scrape_configs"] for found in job["dns_sd_configs"]
    }
    assert scraped == {"server": SERVICES["server"]["ports"][0]["target"], "worker": 9101}
    assert {job["job_name"] for job in configuration["scrape_configs"]} == {f"instructloop-{name}" for name in OURS}
    for watched in OURS:
        assert set(SERVICES[watched]["networks"]) & set(SERVICES["prometheus"]["networks"])


def test_grafana_is_provisioned_with_what_is_mounted() -> None:
    grafana = ROOT / "deploy" / "grafana"
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/instructloop.yaml").read_text())["providers"]
    mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]}
    assert source["url"] == "http://prometheus:9090"
    assert mounted["../grafana/dashboards"] == provider["options"]["path"]
    assert all((DOCKER / place).exists() for place in mounted if place.startswith(".."))
    assert "GF_SECURITY_ADMIN_PASSWORD" in SERVICES["grafana"]["environment"]
