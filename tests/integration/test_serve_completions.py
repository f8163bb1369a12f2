"""The unmodified openai client against a real server."""

import httpx2
import openai
import pytest
from openai import OpenAI
from running_server import RunningServer

pytestmark = pytest.mark.engine


@pytest.fixture
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_models_lists_the_released_policy_and_the_live_version(client: OpenAI) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert list(models)[:2] == ["policy", "policy-v1"]  # others may be kept warm
    assert models["policy-v1"] == {
        "id": "policy-v1",
        "object": "model",
        "created": models["policy"]["created"],
        "owned_by": "instructloop",
        "policy_version": 1,
        "release_role": "stable",
    }
    assert client.models.retrieve("policy-v1").to_dict() == models["policy-v1"]
    with pytest.raises(openai.NotFoundError, match="policy, policy-v1"):
        client.models.retrieve("policy-v9")


def test_chat_completion_names_the_version_that_sampled_it(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="policy", messages=asked("hello"), n=3, max_completion_tokens=8, logprobs=True, top_logprobs=2
    )
    completion = answer.parse()
    assert answer.headers["x-policy-version"] == "1"
    assert completion.model == "policy-v1"
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.usage is not None and completion.usage.prompt_tokens == len("> hello\n>")
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert all(len(token.top_logprobs) >= 2 for token in logprobs.content)


def test_a_pinned_version_answers_as_the_released_one_does(client: OpenAI) -> None:
    def greedy(model: str) -> str | None:
        completion = client.chat.completions.create(
            model=model, messages=asked("hello"), temperature=0, max_completion_tokens=12
        )
        return completion.choices[0].message.content

    assert greedy("policy-v1") == greedy("policy")


def test_a_stream_adds_up_to_the_completion(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="policy", messages=asked("hello"), temperature=0, max_completion_tokens=12
    )
    stream = client.chat.completions.create(
        model="policy",
        messages=asked("hello"),
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    assert {chunk.model for chunk in chunks} == {"policy-v1"}


def test_text_completions_take_many_prompts_and_token_ids(client: OpenAI) -> None:
    many = client.completions.create(model="policy", prompt=["one", "two"], n=2, max_tokens=4)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model="policy", prompt=[5, 6, 7], max_tokens=4)
    assert ids.usage is not None and ids.usage.prompt_tokens == 3


def test_a_client_cannot_choose_the_completion_id(server: RunningServer) -> None:
    ids = set()
    for _ in range(2):
        answer = httpx2.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "policy", "messages": asked("hello"), "max_tokens": 1, "request_id": "mine"},
            headers={"x-request-id": "mine"},
        )
        assert answer.headers["x-request-id"] == "mine"
        ids.add(answer.json()["id"])
    assert len(ids) == 2 and not any("mine" in id for id in ids)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "policy-v9"}, 404, None),
        ({"model": "gpt-4"}, 404, None),
        ({"model": 7}, 400, "model"),
        ({"user": 7}, 400, "user"),
        ({"safety_identifier": ["s3cret"]}, 400, "safety_identifier"),
        ({"messages": None}, 400, "messages"),
        ({"n": 17}, 400, "n"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"seed": 2**63}, 400, "seed"),
        ({"structured_outputs": {"regex": "a*"}}, 400, "structured_outputs"),
        ({"store": "yes"}, 400, "store"),
        ({"best_of": 2}, 400, "best_of"),
        ({"top_k": 10**20}, 400, "top_k"),
        ({"stream_interval": 10**30}, 400, None),
        ({"repetition_penalty": 5e-324}, 400, "repetition_penalty"),
        ({"structured_outputs": "s3cret"}, 400, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "allowed_token_ids": [0]}, 400, "allowed_token_ids"),
        ({"response_format": {"type": "json_object"}, "bad_words": ["{"]}, 400, "bad_words"),
        ({"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "s3cret"}}}, 400, "tools"),
        ({"max_tokens": 257}, 400, "max_tokens"),
        ({"temperature": "s3cret"}, 400, "temperature"),
        ({"messages": asked("x" * 300)}, 400, "input_tokens"),
        ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ],
)
def test_bad_requests_are_refused_in_the_one_error_shape(
    server: RunningServer, body: dict[str, object], status: int, param: str | None
) -> None:
    answer = httpx2.post(
        f"{server.url}/v1/chat/completions", json={"model": "policy", "messages": asked("hello")} | body
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert "s3cret" not in answer.text
    assert error["code"] == ("model_not_found" if status == 404 else None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_p", 77.0), ("stop_token_ids", [77777]), ("logit_bias", {"77777": 1}), ("bad_words", ["77", ""])],
)
def test_a_value_at_fault_is_never_repeated(server: RunningServer, field: str, value: object) -> None:
    answer = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "hello", field: value})
    assert answer.status_code == 400
    assert "77" not in answer.json()["error"]["message"]


def test_an_oversized_body_is_refused_while_it_is_read(server: RunningServer) -> None:
    answer = httpx2.post(
        f"{server.url}/v1/completions", content=b" " * ((1 << 20) + 1), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_not_json_is_refused(server: RunningServer) -> None:
    url = f"{server.url}/v1/completions"
    assert httpx2.post(url, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert httpx2.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415


def test_health_metrics_and_version_answer(server: RunningServer) -> None:
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    ready = httpx2.get(f"{server.url}/ready").json()
    assert ready == {"status": "ready", "generation": ready["generation"]}
    metrics = httpx2.get(f"{server.url}/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    page = metrics.text
    assert 'instructloop_requests_total{policy_version="1",route="/v1/chat/completions",status="200"}' in page
    assert httpx2.get(f"{server.url}/version").json()["policy_versions"][0] == 1
