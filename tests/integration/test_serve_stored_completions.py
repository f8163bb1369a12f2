"""The unmodified openai client on every route of stored completions; real Redis, no engine."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionDeleted
from pydantic import JsonValue
from redis import Redis
from stored_completions_app import HELLO, app_over, finish, kept, kept_text

from feedback.records import Prompt
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.recording import Recorder

# serve.services names the fleet, and so imports vLLM, which imports what torch deprecates: inside a test, where this
# one warning can be let through.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

Connect = Callable[[str], openai.AsyncOpenAI]


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[FeedbackStore]:
    store = FeedbackStore.connect(redis_url, FeedbackSettings())
    yield store
    await store.close()


@pytest.fixture
def app(store: FeedbackStore) -> FastAPI:
    return app_over(store)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://il") as client:
        client.headers["authorization"] = "Bearer alice"
        yield client


@pytest.fixture
async def connect(app: FastAPI) -> AsyncIterator[Connect]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http:

        def as_principal(name: str) -> openai.AsyncOpenAI:
            return openai.AsyncOpenAI(base_url="http://il/v1", api_key=name, http_client=http, max_retries=0)

        yield as_principal


@pytest.fixture
def client(connect: Connect) -> openai.AsyncOpenAI:
    return connect("alice")


async def listed(client: openai.AsyncOpenAI, **filters: Any) -> list[str]:
    return [completion.id async for completion in client.chat.completions.list(**filters)]


async def test_a_chat_completion_in_openais_shape(
    store: FeedbackStore, client: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await store.keep([kept("chatcmpl-1", metadata={"k": "v"}, user="ann")])
    answer = (await http.get("/v1/chat/completions/chatcmpl-1")).json()
    assert answer == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1000,
        "model": "policy-v1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "text of chatcmpl-1", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "metadata": {"k": "v"},
        "input_user": "ann",
        "temperature": 0.5,
        "top_p": 1.0,
    }
    strict = ChatCompletion.model_validate(answer, strict=True)
    assert strict == await client.chat.completions.retrieve("chatcmpl-1")


async def test_a_text_completion_counts_each_prompt_once(
    store: FeedbackStore, client: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await store.keep([kept_text("cmpl-1")])
    answer = (await http.get("/v1/completions/cmpl-1")).json()
    strict = Completion.model_validate(answer, strict=True)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in strict.choices] == [
        (index, str(index), "length") for index in range(4)
    ]
    assert strict.usage is not None
    assert (strict.usage.prompt_tokens, strict.usage.completion_tokens, strict.usage.total_tokens) == (3, 10, 13)
    assert strict == await client.get("/completions/cmpl-1", cast_to=Completion)


async def test_a_message_that_is_more_than_its_text_is_shown_as_served(
    store: FeedbackStore, http: httpx2.AsyncClient
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "frog", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "frogs"}
    choices = (
        kept("x").choices[0].model_copy(update={"message": message, "finish_reason": "tool_calls"}),
        kept("x").choices[0].model_copy(update={"index": 1, "finish_reason": "abort"}),
        kept("x").choices[0].model_copy(update={"index": 2, "finish_reason": None}),
    )
    await store.keep([kept("chatcmpl-1", choices=choices, prompts=(Prompt(messages=(HELLO,)),))])
    answer = (await http.get("/v1/chat/completions/chatcmpl-1")).json()
    strict = ChatCompletion.model_validate(answer, strict=True)
    assert answer["choices"][0]["message"] == {**message, "refusal": None}
    # OpenAI's words for an end know no abort: what was cut short shows as length.
    assert [choice.finish_reason for choice in strict.choices] == ["tool_calls", "length", "length"]
    assert strict.usage is None  # how many tokens the prompt had is not known


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_the_list_pages_through_what_was_stored(
    store: FeedbackStore, client: openai.AsyncOpenAI, size: int
) -> None:
    names = [f"chatcmpl-{number:02d}" for number in range(10)]
    await store.keep([kept(name, 1000 + number // 4) for number, name in enumerate(names)])
    await store.keep([kept("chatcmpl-ttl", store=None), kept("chatcmpl-bob", principal="bob"), kept_text("cmpl-1")])
    assert await listed(client, limit=size) == names
    assert await listed(client, limit=size, order="desc") == names[::-1]
    assert await listed(client, limit=size, after=names[6]) == names[7:]


async def test_a_page_says_where_it_ends_and_whether_there_is_more(
    store: FeedbackStore, http: httpx2.AsyncClient
) -> None:
    empty: dict[str, Any] = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert (await http.get("/v1/chat/completions")).json() == empty
    await store.keep([kept(f"chatcmpl-{number:02d}") for number in range(21)])
    page = (await http.get("/v1/chat/completions")).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == (
        "list",
        "chatcmpl-00",
        "chatcmpl-19",
        True,
    )
    assert [ChatCompletion.model_validate(one, strict=True).id for one in page["data"]] == [
        f"chatcmpl-{number:02d}" for number in range(20)
    ]
    page = (await http.get("/v1/chat/completions", params={"after": page["last_id"]})).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("chatcmpl-20", "chatcmpl-20", False)


async def test_filters_keep_paging_right(store: FeedbackStore, client: openai.AsyncOpenAI) -> None:
    await store.keep(
        [
            kept(
                f"chatcmpl-{number:03d}",
                1000 + number // 50,
                model=f"policy-v{number % 3}",
                metadata={"rest": str(number % 7), "weird [k]=": "ö&1"} if number % 2 else {},
            )
            for number in range(300)
        ]
    )
    seventh = [f"chatcmpl-{number:03d}" for number in range(300) if number % 2 and number % 7 == 3]
    for size in (1, 2, 21, 22, 100):
        assert await listed(client, metadata={"rest": "3"}, limit=size) == seventh
    both = {"rest": "3", "weird [k]=": "ö&1"}
    assert await listed(client, metadata=both, limit=5, order="desc") == seventh[::-1]
    assert await listed(client, metadata=both, model="policy-v2") == [one for one in seventh if int(one[9:]) % 3 == 2]
    assert await listed(client, metadata={"rest": "7"}) == []
    assert await listed(client, model="policy") == []
    page = await client.chat.completions.list(metadata={"rest": "3"}, limit=len(seventh))
    assert page.has_more is False


async def test_deleting_page_by_page_empties_the_list(store: FeedbackStore, client: openai.AsyncOpenAI) -> None:
    await store.keep([kept(f"chatcmpl-{number}") for number in range(9)])
    while (page := await client.chat.completions.list(limit=4)).data:
        for completion in page.data:
            await client.chat.completions.delete(completion.id)
    assert await listed(client) == []


async def test_metadata_is_replaced_and_cleared(
    store: FeedbackStore, client: openai.AsyncOpenAI, redis_url: str
) -> None:
    await store.keep([kept("chatcmpl-1", metadata={"old": "1"}), kept("chatcmpl-2", store=None)])
    changed = await client.chat.completions.update("chatcmpl-1", metadata={"k": "v", "a" * 64: "b" * 512})
    assert changed.metadata == {"k": "v", "a" * 64: "b" * 512}
    assert await client.chat.completions.retrieve("chatcmpl-1") == changed
    assert await listed(client, metadata={"k": "v"}) == ["chatcmpl-1"]
    assert (await client.chat.completions.update("chatcmpl-1", metadata=None)).metadata == {}
    assert (await client.chat.completions.update("chatcmpl-2", metadata={"k": "v"})).metadata == {"k": "v"}
    with Redis.from_url(redis_url) as redis:
        assert redis.ttl("gen:chatcmpl-1") == -1
        assert redis.ttl("gen:chatcmpl-2") > 0


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {str(number): "v" for number in range(17)}},
        {"metadata": {"secret" * 11: "v"}},
        {"metadata": {"k": "secret" * 86}},
        {"metadata": {"secret": 1}},
        {"metadata": "secret"},
        {"metadata": {}, "model": "secret"},
        {},
        [],
    ],
    ids=["pairs", "key", "value", "number", "string", "model", "nothing", "list"],
)
async def test_a_change_over_the_limits_is_refused_without_echo(
    store: FeedbackStore, http: httpx2.AsyncClient, body: Any
) -> None:
    before = kept("chatcmpl-1", metadata={"old": "1"})
    await store.keep([before])
    answer = await http.post("/v1/chat/completions/chatcmpl-1", json=body)
    assert answer.status_code == 400
    assert "secret" not in answer.text
    assert await store.completion("chatcmpl-1") == before


async def test_half_a_surrogate_pair_is_refused(store: FeedbackStore, http: httpx2.AsyncClient) -> None:
    await store.keep([kept("chatcmpl-1")])
    for body in (rb'{"metadata": {"\ud800": "v"}}', rb'{"metadata": {"k": "\ud800"}}'):
        answer = await http.post(
            "/v1/chat/completions/chatcmpl-1", content=body, headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


async def test_what_is_deleted_is_gone(store: FeedbackStore, client: openai.AsyncOpenAI, redis_url: str) -> None:
    await store.keep([kept("chatcmpl-1"), kept_text("cmpl-1"), kept("chatcmpl-2", store=None)])
    deleted = await client.chat.completions.delete("chatcmpl-1")
    assert deleted.model_dump() == {"id": "chatcmpl-1", "object": "chat.completion.deleted", "deleted": True}
    ChatCompletionDeleted.model_validate(deleted.model_dump(), strict=True)
    assert (await client.chat.completions.delete("chatcmpl-2")).deleted
    assert await client.delete("/completions/cmpl-1", cast_to=dict[str, object]) == {
        "id": "cmpl-1",
        "object": "text_completion.deleted",
        "deleted": True,
    }
    for again in ("chatcmpl-1", "chatcmpl-2"):
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.delete(again)
    with Redis.from_url(redis_url) as redis:
        assert redis.keys("*") == []


async def test_the_messages_are_those_of_the_request(
    store: FeedbackStore, client: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    parts: list[JsonValue] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call: dict[str, JsonValue] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: tuple[dict[str, JsonValue], ...] = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    )
    await store.keep([kept("chatcmpl-1", prompts=(Prompt(messages=messages, token_ids=(1,)),))])
    answer = (await http.get("/v1/chat/completions/chatcmpl-1/messages")).json()
    rest = {"name": None, "content_parts": None}
    assert answer == {
        "object": "list",
        "data": [
            {"id": "chatcmpl-1-0", "role": "system", "content": "be brief", **rest},
            {"id": "chatcmpl-1-1", "role": "user", "content": None, "name": "ann", "content_parts": parts},
            {"id": "chatcmpl-1-2", "role": "assistant", "content": None, "tool_calls": [call], **rest},
            {"id": "chatcmpl-1-3", "role": "tool", "content": "42", "tool_call_id": "call_1", **rest},
        ],
        "first_id": "chatcmpl-1-0",
        "last_id": "chatcmpl-1-3",
        "has_more": False,
    }
    ids = [f"chatcmpl-1-{place}" for place in range(4)]

    async def paged(**how: Any) -> list[str]:
        return [message.id async for message in client.chat.completions.messages.list("chatcmpl-1", **how)]

    for size in (1, 2, 3, 4, 5):
        assert await paged(limit=size) == ids
        assert await paged(limit=size, order="desc") == ids[::-1]
    assert await paged(limit=1, after=ids[2]) == ids[3:]
    assert await paged(order="desc", after=ids[2]) == ids[1::-1]
    with pytest.raises(openai.BadRequestError, match="no message of this"):
        await paged(after="chatcmpl-1-4")


ROUTES = [
    ("GET", "/v1/chat/completions/{}"),
    ("POST", "/v1/chat/completions/{}"),
    ("DELETE", "/v1/chat/completions/{}"),
    ("GET", "/v1/chat/completions/{}/messages"),
    ("GET", "/v1/completions/{}"),
    ("DELETE", "/v1/completions/{}"),
]


@pytest.mark.parametrize(("method", "route"), ROUTES)
async def test_others_completions_do_not_exist(
    store: FeedbackStore, http: httpx2.AsyncClient, method: str, route: str
) -> None:
    """Nor does a text completion under the chat route, a chat completion under the text route, or an index key."""
    hers = [kept("chatcmpl-bob", principal="bob"), kept_text("cmpl-bob", principal="bob")]
    other_kind = kept("chatcmpl-1") if route.startswith("/v1/completions") else kept_text("cmpl-1")
    await store.keep([*hers, other_kind])
    body = {"metadata": {"k": "v"}} if method == "POST" else None
    answers = [
        await http.request(method, route.format(name), json=body)
        for name in ("never", "chatcmpl-bob", "cmpl-bob", other_kind.id, "by:bob", "by:alice")
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.content for answer in answers}) == 1
    for completion in (*hers, other_kind):
        assert await store.completion(completion.id) == completion


@pytest.mark.parametrize("after", ["chatcmpl-none", "chatcmpl-bob", "chatcmpl-gone"])
async def test_a_list_behind_what_is_not_stored_is_refused(
    store: FeedbackStore, connect: Connect, client: openai.AsyncOpenAI, after: str
) -> None:
    await store.keep([kept("chatcmpl-1"), kept("chatcmpl-bob", principal="bob"), kept("chatcmpl-gone")])
    await client.chat.completions.delete("chatcmpl-gone")
    with pytest.raises(openai.BadRequestError, match="after is no stored chat completion") as refused:
        await listed(client, after=after)
    assert refused.value.param == "after"
    assert after not in refused.value.message
    assert await listed(connect("bob")) == ["chatcmpl-bob"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"limit": "0"},
        {"limit": "101"},
        {"order": "up"},
        {"metadata": "v"},
        {"metadata[]": "v"},
        {"metdata[k]": "v"},
        {"after": "x" * 129},
    ],
    ids=str,
)
async def test_a_list_that_cannot_be_is_refused(http: httpx2.AsyncClient, parameters: dict[str, str]) -> None:
    assert (await http.get("/v1/chat/completions", params=parameters)).status_code == 400


async def test_what_finished_a_moment_ago_is_there_already(app: FastAPI, client: openai.AsyncOpenAI) -> None:
    recorder: Recorder = app.state.services.recorder  # nothing runs it: what finishes waits
    finish(recorder, "chatcmpl-1")
    assert (await client.chat.completions.retrieve("chatcmpl-1")).choices[0].message.content == "text"
    assert (await client.chat.completions.messages.list("chatcmpl-1")).data[0].content == "hello"
    assert await listed(client) == ["chatcmpl-1"]
    finish(recorder, "chatcmpl-2")
    assert (await client.chat.completions.update("chatcmpl-2", metadata={"k": "v"})).metadata == {"k": "v"}
    finish(recorder, "chatcmpl-3")
    assert (await client.chat.completions.delete("chatcmpl-3")).deleted
    assert await recorder.flush()
    assert await listed(client) == ["chatcmpl-1", "chatcmpl-2"]
    assert (await client.chat.completions.retrieve("chatcmpl-2")).metadata == {"k": "v"}


async def test_without_redis_each_route_answers_503() -> None:
    store = FeedbackStore.connect("unix:///nonexistent/redis.sock", FeedbackSettings())
    app = app_over(store)
    transport = httpx2.ASGITransport(app)
    headers = {"authorization": "Bearer alice"}
    async with httpx2.AsyncClient(transport=transport, base_url="http://il", headers=headers) as http:
        for waiting in (False, True):
            for method, route in [("GET", "/v1/chat/completions"), *ROUTES]:
                body: dict[str, Any] | None = {"metadata": {}} if method == "POST" else None
                answer = await http.request(method, route.format("chatcmpl-1"), json=body)
                if waiting and route.startswith("/v1/chat/completions/{}") and method == "GET":
                    assert answer.status_code == 200  # it is still at hand
                elif waiting and (method, route) == ("GET", "/v1/completions/{}"):
                    assert answer.status_code == 404  # and no text completion
                else:
                    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            finish(app.state.services.recorder, "chatcmpl-1")
    await store.close()


def test_the_document_knows_the_filter_and_each_shape(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    listing = paths["/v1/chat/completions"]["get"]
    parameters = {parameter["name"]: parameter for parameter in listing["parameters"]}
    assert set(parameters) >= {"after", "limit", "order", "model", "metadata"}
    assert (parameters["metadata"]["style"], parameters["metadata"]["explode"]) == ("deepObject", True)
    for method, route in ROUTES:
        answer = paths[route.format("{completion_id}")][method.lower()]["responses"]["200"]
        assert answer["content"]["application/json"]["schema"]["$ref"]
