"""The OpenAPI document is exact: every route, every status, every body; tried by schemathesis against the server."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import one_of
from running_server import RunningServer
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_error_shape import JSON, WRONG

from deploy.settings import DeploySettings
from feedback.settings import FeedbackSettings
from serve.settings import ServeSettings

pytestmark = pytest.mark.engine

CONFORMS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 25
CANARY_PLOT = "/v1/release/plots/canary.svg"
"""Of each operation; in all about half a minute."""


@pytest.fixture(scope="module")
def document(server: RunningServer) -> dict[str, Any]:
    document: dict[str, Any] = httpx2.get(f"{server.url}/openapi.json").json()
    return document


@pytest.fixture(scope="module")
def api(server: RunningServer) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_it_is_openapi_3_1_without_loose_ends(api: BaseSchema, document: dict[str, Any]) -> None:
    api.validate()
    assert document["openapi"].startswith("3.1")
    for ref in _refs(document):
        found = document
        for part in ref.removeprefix("#/").split("/"):
            found = found[part]
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from _refs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _refs(inner)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_every_route_is_in_it(document: dict[str, Any], tmp_path: Path) -> None:
    from serve.app import create_app  # imports vLLM, which imports what torch deprecates

    app = create_app(ServeSettings(), FeedbackSettings(), DeploySettings(), tmp_path, "unix:///nowhere")
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    told = {(method.lower(), route.path) for route in routes if route.include_in_schema for method in route.methods}
    assert len(told) >= 19
    assert {(method, path) for method, path, _ in operations(document)} == told
    assert {route.path for route in routes if not route.include_in_schema} <= {"/", "/operator", "/pages/{name}"}


def test_every_error_is_the_one_error(document: dict[str, Any]) -> None:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for method, path, operation in operations(document):
        told = {status: answer for status, answer in operation["responses"].items() if int(status) >= 400}
        assert "500" in told
        assert ("security" in operation) == ({"401", "403", "429"} <= told.keys()), path
        assert "security" in operation or path in ("/health", "/ready", "/metrics", "/version")
        for status, answer in told.items():
            if (method, path, status) != ("get", "/ready", "503"):  # an error with the reasons
                assert answer["content"] == error, (path, status)
            assert "x-request-id" in answer["headers"]
            later = status in ("429", "503") or (status == "409" and path.startswith("/v1/feedback"))
            assert ("Retry-After" in answer["headers"]) == later, (path, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_no_answer_is_off_the_document(api: BaseSchema, subtests: pytest.Subtests) -> None:
    """Requests that fit the document, and requests that do not."""
    for result in api.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        cases = one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode])

        @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=cases)
        def ask(case: schemathesis.Case[Any]) -> None:
            _sample_little(case)
            case.call_and_validate(checks=CONFORMS, timeout=60)

        with subtests.test(operation.label):
            ask()


def _sample_little(case: schemathesis.Case[Any]) -> None:
    """Cap the tokens asked for, or the policy would be sampled for minutes."""
    if isinstance(case.body, dict) and case.path.endswith("/completions"):
        for field in ("max_tokens", "max_completion_tokens"):
            asked = case.body.get(field, 256)
            if isinstance(asked, int) and asked > 2:
                case.body[field] = 2


class Checked:
    """Sends requests, checks the answers against the document and remembers which of its answers were seen."""

    def __init__(self, api: BaseSchema, http: httpx2.Client) -> None:
        self._api = api
        self._http = http
        self.seen: set[tuple[str, str, int]] = set()

    def __call__(self, method: str, path: str, status: int | set[int], ids: str = "", **request: Any) -> Any:
        """Send to ``path`` with ``ids`` in its braces; returns the answer's JSON, or text."""
        sent_to = path if not ids else path[: path.index("{")] + ids + path[path.index("}") + 1 :]
        answer = self._http.request(method, sent_to, **request)
        assert answer.status_code in (status if isinstance(status, set) else {status}), answer.text
        operation: APIOperation[Any, Any, Any, Any] = self._api[path][method]
        operation.validate_response(answer)
        self.seen.add((method.lower(), path, answer.status_code))
        return answer.json() if answer.headers["content-type"] == "application/json" else answer.text


def test_every_success_is_as_told(api: BaseSchema, http: httpx2.Client, document: dict[str, Any]) -> None:
    check = Checked(api, http)
    for probe in ("/health", "/ready", "/metrics", "/version"):
        check("GET", probe, 200)
    check("GET", "/v1/models", 200)
    check("GET", "/v1/models/{model_id}", 200, "policy-v1")
    hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "n": 2, "store": True}
    for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}, {"return_token_ids": True}):
        check("POST", "/v1/completions", 200, json={"prompt": "hello", "logprobs": 2} | more)
        check("POST", "/v1/chat/completions", 200, json=hello | {"logprobs": True, "top_logprobs": 2} | more)
    chat = check("POST", "/v1/chat/completions", 200, json=hello)["id"]
    check("GET", "/v1/chat/completions", 200)
    one = "/v1/chat/completions/{completion_id}"
    check("GET", one, 200, chat)
    check("POST", one, 200, chat, json={"metadata": {"k": "v"}})
    check("GET", one + "/messages", 200, chat)
    text = check("POST", "/v1/completions", 200, json={"prompt": "hello"})["id"]
    check("GET", "/v1/completions/{completion_id}", 200, text)
    check("DELETE", "/v1/completions/{completion_id}", 200, text)
    _check_feedback(check, chat)
    check("DELETE", one, 200, chat)
    for method, path, _ in operations(document):
        if method == "get" and path.startswith("/v1/release") and path != CANARY_PLOT:
            check("GET", path, 200)
    told = {(m, p, int(s)) for m, p, operation in operations(document) for s in operation["responses"] if s < "300"}
    moving = {("post", f"/v1/release/{verb}", 200) for verb in ("canary", "promote", "rollback")}
    with_canary = moving | {("get", CANARY_PLOT, 200)}
    assert check.seen == told - with_canary  # those start engines: see test_serve_release_routes


def _check_feedback(check: Checked, chat: str) -> None:
    ranking = {"completion_id": chat, "ranking": [[0], [1]]}
    kept = check("POST", "/v1/feedback/comparisons", 201, json=ranking)
    assert check("POST", "/v1/feedback/comparisons", 200, json=ranking) == kept
    assert check("GET", "/v1/feedback/comparisons/{comparison_id}", 200, kept["id"]) == kept
    outside = {"prompt": secrets.token_hex(), "completions": ["a", "b"], "preferred": "both_bad"}
    check("POST", "/v1/feedback/comparisons", 201, json=outside)
    written = {"completion_id": chat, "completion": "better"}
    kept = check("POST", "/v1/feedback/demonstrations", 201, json=written)
    assert check("POST", "/v1/feedback/demonstrations", 200, json=written) == kept
    rated = {"completion_id": chat, "overall": 5}
    kept = check("POST", "/v1/feedback/ratings", 201, json=rated)
    assert check("POST", "/v1/feedback/ratings", 200, json=rated) == kept
    check("GET", "/v1/feedback/comparisons", 200, params={"limit": 1})
    check("GET", "/v1/feedback/summary", 200)
    check("DELETE", "/v1/feedback/principals/{principal_name}", 200, "nobody")
    messages = [{"role": "user", "content": "hello"}]
    for prompt in ({"prompt": "hello"}, {"messages": messages}):
        task = check("POST", "/v1/feedback/tasks", 201, json=prompt)
        assert {name: task[name] for name in ("prompt", "messages") if name in task} == prompt


def test_every_error_of_a_wrong_request_is_as_told(
    api: BaseSchema, http: httpx2.Client, document: dict[str, Any]
) -> None:
    check = Checked(api, http)
    for method, path, operation in operations(document):
        ids = "nothing" if "{" in path else ""
        if path == "/v1/feedback/principals/{principal_name}":
            check("DELETE", path, 400, "n" * 65)
        elif ids:
            check(method.upper(), path, 404, ids, **({"json": {"metadata": None}} if method == "post" else {}))
        if method == "post":
            check("POST", path, 413, ids, content=b" " * ((1 << 20) + 1), headers=JSON)
            for wrong in WRONG.values():
                check("POST", path, {int(told) for told in operation["responses"]}, ids, **wrong)
    completion_id = check("POST", "/v1/completions", 200, json={"prompt": "hello"})["id"]
    ranked, rated = {"completions": ["a", "b"], "prompt": "one"}, {"completion_id": completion_id}
    for path, first, second in (
        ("comparisons", ranked | {"preferred": 0}, ranked | {"preferred": 1}),
        ("demonstrations", {"prompt": "one", "completion": "a"}, {"prompt": "one", "completion": "b"}),
        ("ratings", rated | {"overall": 1}, rated | {"overall": 2}),
    ):
        key = {"Idempotency-Key": secrets.token_hex()}
        check("POST", f"/v1/feedback/{path}", 201, json=first, headers=key)
        check("POST", f"/v1/feedback/{path}", 422, json=second, headers=key)
    unknown = {"model": "policy-v9", "prompt": "p", "messages": [{"role": "user", "content": "hello"}]}
    check("POST", "/v1/completions", 404, json=unknown)
    check("POST", "/v1/chat/completions", 404, json=unknown)
    check("POST", "/v1/feedback/comparisons", 404, json={"completion_id": "none", "preferred": 0})
    check("POST", "/v1/feedback/demonstrations", 404, json={"completion_id": "none", "completion": "a"})
    check("POST", "/v1/feedback/ratings", 404, json={"completion_id": "none", "overall": 1})
    check("GET", "/ready", 400, params={"only": "feedback"})
    check("GET", "/v1/chat/completions", 400, params={"limit": 101})
    check("GET", "/v1/feedback/comparisons", 400, params={"limit": 101})
    check("GET", "/v1/chat/completions/{completion_id}/messages", 400, "nothing", params={"limit": 101})
    check("GET", CANARY_PLOT, 404)
    check("GET", "/v1/release/history", 400, params={"count": 0})
    check("GET", "/v1/release/versions", 400, params={"count": 0})
    for verb, asked in (("canary", {"version": 2, "fraction": 0.1}), ("promote", {}), ("rollback", {})):
        check("POST", f"/v1/release/{verb}", 428, json=asked)
        check("POST", f"/v1/release/{verb}", 412, json=asked, headers={"If-Match": "999999"})
    told = {(m, p, int(s)) for m, p, operation in operations(document) for s in operation["responses"]}
    elsewhere = (401, 403, 409, 429)  # of keys, rates, requests in flight and what the release does not allow
    client_errors = {(m, p, s) for m, p, s in told if 400 <= s < 500 and s not in elsewhere}
    never = client_errors - check.seen
    assert never == {("post", "/v1/feedback/tasks", 404)}  # of a server that never saw a prompt
