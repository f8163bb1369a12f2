"""The openai client, sync and async, through the whole surface; every answer is OpenAI's and nothing more."""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import httpx2
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from running_server import RunningServer

pytestmark = pytest.mark.engine

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"messages": HELLO, "temperature": 0, "max_completion_tokens": 24}
SECONDS_TO_REFUSE = 1.0
"""The contract's 50 ms, with room for a busy machine; the medians are printed."""


class Ask(Protocol):
    """One call of a client's method by its dotted name; a stream comes as the list of its chunks."""

    def __call__(self, method: str, **arguments: Any) -> Any: ...


def _found(client: openai.OpenAI | openai.AsyncOpenAI, method: str) -> Any:
    found: Any = client
    for name in method.split("."):
        found = getattr(found, name)
    return found


def _sync(url: str) -> Ask:
    def ask(method: str, **arguments: Any) -> Any:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = _found(client, method)(**arguments)
            return list(answer) if isinstance(answer, openai.Stream) else answer

    return ask


def _async(url: str) -> Ask:
    async def asked(method: str, arguments: dict[str, Any]) -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = await _found(client, method)(**arguments)
            return [chunk async for chunk in answer] if isinstance(answer, openai.AsyncStream) else answer

    return lambda method, **arguments: asyncio.run(asked(method, arguments))


CLIENTS: dict[str, Callable[[str], Ask]] = {"sync": _sync, "async": _async}


@pytest.fixture(params=list(CLIENTS))
def ask(request: pytest.FixtureRequest, server: RunningServer) -> Ask:
    return CLIENTS[request.param](server.url)


def strictly(answer: Any, *, echoed_logprobs: bool = False) -> Any:
    """The answer, shown to be of OpenAI's own type: no conversion needed, no field beyond it.

    OpenAI's API, against its types, sends ``finish_reason: null`` in the chunks of a text completion, and null
    for the log-prob of the first token of an echoed prompt; the same is allowed here.
    """
    told = json.loads(answer.to_json())
    if isinstance(answer, Completion):
        for choice in told["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            if echoed_logprobs:
                for tokens in ("token_logprobs", "top_logprobs"):
                    assert choice["logprobs"][tokens].pop(0) is None
    is_openais(type(answer), told)
    return answer


def is_openais(kind: type[BaseModel], told: dict[str, Any]) -> None:
    parsed = kind.model_validate_json(json.dumps(told), strict=True)
    assert list(_beyond(parsed, "")) == []


def _beyond(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from (f"{path}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from _beyond(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _beyond(item, f"{path}[{index}]")


def chat(ask: Ask, **asked: Any) -> ChatCompletion:
    answer: ChatCompletion = strictly(ask("chat.completions.create", **{"model": "policy", "messages": HELLO} | asked))
    return answer


def text(ask: Ask, **asked: Any) -> Completion:
    answer: Completion = strictly(ask("completions.create", **{"model": "policy", "max_tokens": 8} | asked))
    return answer


def content(completion: ChatCompletion) -> str:
    answer = completion.choices[0].message.content
    assert answer is not None
    return answer


def test_what_strictly_refuses(server: RunningServer) -> None:
    told: dict[str, Any] = chat(CLIENTS["sync"](server.url), max_completion_tokens=1).to_dict(mode="json")
    is_openais(ChatCompletion, told)
    with pytest.raises(AssertionError, match="token_ids"):
        is_openais(ChatCompletion, told | {"choices": [{**told["choices"][0], "token_ids": None}]})
    with pytest.raises(ValueError, match="created"):
        is_openais(ChatCompletion, told | {"created": "1"})


def test_a_chat_completion_with_everything_at_once(ask: Ask) -> None:
    raw = ask(
        "chat.completions.with_raw_response.create",
        model="policy",
        messages=HELLO,
        n=2,
        max_completion_tokens=8,
        logprobs=True,
        top_logprobs=3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": 1},
        stop=["\x00"],
        seed=7,
        temperature=0.9,
        top_p=0.9,
        user="ann",
        store=False,
        metadata={"k": "v"},
        extra_headers={"x-request-id": "mine"},
    )
    answer = strictly(raw.parse())
    assert isinstance(answer, ChatCompletion)
    assert (answer.model, raw.headers["x-policy-version"], raw.headers["x-request-id"]) == ("policy-v1", "1", "mine")
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert all(1 <= len(token.top_logprobs) <= 4 for token in choice.logprobs.content)
    assert answer.usage is not None and answer.usage.prompt_tokens == len("> hello\n>")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_stream_adds_up(ask: Ask) -> None:
    asked = {"model": "policy", "messages": HELLO, "n": 2, "seed": 5, "max_completion_tokens": 24}
    asked |= {"logprobs": True, "top_logprobs": 1}
    whole = chat(ask, **asked)
    chunks = ask("chat.completions.create", **asked, stream=True, stream_options={"include_usage": True})
    assert all(isinstance(strictly(chunk), ChatCompletionChunk) for chunk in chunks)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {(chunk.id, chunk.model) for chunk in chunks} == {(chunks[0].id, "policy-v1")}
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        assert [token for part in parts for token in (part.logprobs and part.logprobs.content) or ()] == (
            choice.logprobs.content
        )


def test_a_seed_settles_what_is_sampled(ask: Ask) -> None:
    texts = [content(chat(ask, seed=seed, max_completion_tokens=16)) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_text_before_it(ask: Ask) -> None:
    whole = content(chat(ask, **GREEDY))
    stop = whole[4:6]
    stopped = chat(ask, **GREEDY, stop=stop)
    assert content(stopped) == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_logit_bias_decides(ask: Ask) -> None:
    biased = chat(ask, **GREEDY, logit_bias={"67": 100})
    assert len(set(content(biased))) == 1 and len(content(biased)) == 24


def test_penalties_make_repeating_dearer(ask: Ask) -> None:
    def most_repeated(**penalties: float) -> int:
        by_id = {"return_tokens_as_token_ids": True}  # half a character has no text to tell it by
        biased = chat(ask, **GREEDY, logit_bias={"67": 4}, logprobs=True, extra_body=by_id, **penalties)
        logprobs = biased.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        return max(Counter(token.token for token in logprobs.content).values())

    assert most_repeated(presence_penalty=2, frequency_penalty=2) < most_repeated()


YES_OR_NO = {
    "type": "object",
    "properties": {"sure": {"enum": ["yes", "no"]}},
    "required": ["sure"],
    "additionalProperties": False,
}


def test_structured_outputs(ask: Ask) -> None:
    named = {"name": "sure", "schema": YES_OR_NO, "strict": True}
    held = {"extra_body": {"structured_outputs": {"json": YES_OR_NO, "disable_any_whitespace": True}}}
    for how in ({"response_format": {"type": "json_schema", "json_schema": named}}, held):
        answer = chat(ask, max_completion_tokens=200, **how)
        assert answer.choices[0].finish_reason == "stop"
        assert json.loads(content(answer))["sure"] in ("yes", "no")
    assert content(chat(ask, max_completion_tokens=20, response_format={"type": "json_object"})).lstrip()[0] == "{"
    chosen = chat(ask, extra_body={"structured_outputs": {"choice": ["a cat", "a dog"]}})
    assert content(chosen) in ("a cat", "a dog")


TOOL = {"type": "function", "function": {"name": "answer", "strict": True, "parameters": YES_OR_NO}}
CHOICES: dict[str, Any] = {"named": {"type": "function", "function": {"name": "answer"}}, "required": "required"}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_tools_are_called(server: RunningServer, client: str, choice: str) -> None:
    ask = CLIENTS[client](server.url)
    asked = {"tools": [TOOL], "tool_choice": CHOICES[choice], "parallel_tool_calls": False, "seed": 3}
    answer = chat(ask, max_completion_tokens=200, **asked)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function" and calls[0].function.name == "answer"
    assert json.loads(calls[0].function.arguments)["sure"] in ("yes", "no")
    assert answer.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    chunks = ask(
        "chat.completions.create", model="policy", messages=HELLO, max_completion_tokens=200, stream=True, **asked
    )
    parts = [call for chunk in chunks for part in strictly(chunk).choices for call in part.delta.tool_calls or ()]
    arguments = "".join(part.function.arguments or "" for part in parts if part.function)
    assert json.loads(arguments) == json.loads(calls[0].function.arguments)


def test_a_model_that_may_call_a_tool_may_also_answer(ask: Ask) -> None:
    answer = chat(ask, tools=[TOOL], tool_choice="auto")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stored_completion_shows_the_tool_calls_it_was_answered_with(ask: Ask, streamed: bool) -> None:
    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 3, "store": True}
    arguments = {"model": "policy", "messages": HELLO, "max_completion_tokens": 200, "stream": streamed, **asked}
    answer = ask("chat.completions.create", **arguments)
    completion_id = answer[0].id if streamed else answer.id
    deadline = time.monotonic() + 5
    while True:
        try:
            stored = ask("chat.completions.retrieve", completion_id=completion_id)
            break
        except openai.NotFoundError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    (call,) = stored.choices[0].message.tool_calls
    assert call.type == "function" and call.id
    assert call.function.name == "answer" and json.loads(call.function.arguments)["sure"] in ("yes", "no")
    assert stored.choices[0].finish_reason == "tool_calls"


def test_text_prompts_of_every_kind(ask: Ask) -> None:
    for prompt, prompts, tokens in (
        ("one", 1, 3),
        ([5, 6, 7], 1, 3),
        (["one", "four"], 2, 7),
        ([[5, 6], [7]], 2, 3),
    ):
        answer = text(ask, prompt=prompt, n=2)
        assert [choice.index for choice in answer.choices] == list(range(2 * prompts))
        assert answer.usage is not None and answer.usage.prompt_tokens == tokens


def test_a_text_stream_adds_up(ask: Ask) -> None:
    asked = {"prompt": ["one", "two"], "temperature": 0, "logprobs": 2}
    whole = text(ask, **asked)
    chunks = ask(
        "completions.create",
        model="policy",
        max_tokens=8,
        **asked,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        strictly(chunk)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text


def test_text_completions_know_no_tools(ask: Ask) -> None:
    asked = {"model": "policy", "prompt": "one", "temperature": 0, "extra_body": {"tools": [TOOL]}}
    parts = [part.text for chunk in ask("completions.create", **asked, stream=True) for part in chunk.choices]
    assert "".join(parts) == ask("completions.create", **asked).choices[0].text


def test_echo(ask: Ask) -> None:
    plain = text(ask, prompt="hello", temperature=0)
    echoed = ask("completions.create", model="policy", prompt="hello", temperature=0, max_tokens=8, echo=True)
    assert strictly(echoed).choices[0].text == "hello" + plain.choices[0].text
    scored = ask("completions.create", model="policy", prompt="hello", max_tokens=0, echo=True, logprobs=1)
    strictly(scored, echoed_logprobs=True)
    assert scored.choices[0].text == "hello"
    assert scored.choices[0].logprobs.tokens == list("hello")


def test_chat_uses_the_versions_own_template(ask: Ask) -> None:
    by_hand = text(ask, prompt="> hello\n>", temperature=0, max_tokens=24)
    assert by_hand.choices[0].text == content(chat(ask, **GREEDY))


def test_a_version_is_pinned_by_name(ask: Ask) -> None:
    assert content(chat(ask, **GREEDY, model="policy-v1")) == content(chat(ask, **GREEDY))
    assert [model.id for model in ask("models.list").data][:2] == ["policy", "policy-v1"]  # others may be kept warm
    assert ask("models.retrieve", model="policy-v1").id == "policy-v1"
    with pytest.raises(openai.NotFoundError) as refused:
        chat(ask, model="policy-v9")
    assert refused.value.code == "model_not_found"


def test_a_stored_completion_is_got_listed_changed_and_deleted(ask: Ask) -> None:
    answer = chat(ask, max_completion_tokens=4, store=True, seed=0, metadata={"test": "surface"})
    kept = ask("chat.completions.retrieve", completion_id=answer.id)
    assert (kept.choices[0].message.content, kept.seed) == (content(answer), 0)
    assert ask("chat.completions.update", completion_id=answer.id, metadata={"test": answer.id}).id == answer.id
    listed = ask("chat.completions.list", metadata={"test": answer.id})
    assert [completion.id for completion in listed.data] == [answer.id]
    (message,) = ask("chat.completions.messages.list", completion_id=answer.id).data
    assert (message.role, message.content) == ("user", "hello")
    assert ask("chat.completions.delete", completion_id=answer.id).deleted
    with pytest.raises(openai.NotFoundError):
        ask("chat.completions.retrieve", completion_id=answer.id)


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _of_bytes(size: int) -> dict[str, Any]:
    bare = len(json.dumps({"type": "string", "title": ""}, separators=(",", ":")))
    return {"type": "string", "title": "t" * (size - bare)}


Limit = tuple[str, dict[str, Any], dict[str, Any]]


def _limit(route: str, body: Callable[[int], dict[str, Any]], at: int, past: int) -> Limit:
    return route, body(at), body(past)


CHAT, TEXT = "chat/completions", "completions"
LIMITS: dict[str, Limit] = {
    "n": _limit(CHAT, lambda k: {"n": k}, 16, 17),
    "top_logprobs": _limit(CHAT, lambda k: {"logprobs": True, "top_logprobs": k}, 20, 21),
    "logprobs": _limit(TEXT, lambda k: {"logprobs": k}, 20, 21),
    "max_tokens": _limit(TEXT, lambda k: {"max_tokens": k}, 256 - len("hello"), 257),
    "stop": _limit(CHAT, lambda k: {"stop": ["\x00" * (i + 1) for i in range(k)]}, 16, 17),
    "stop, characters": _limit(TEXT, lambda k: {"stop": "\x00" * k}, 256, 257),
    "logit_bias": _limit(TEXT, lambda k: {"logit_bias": dict.fromkeys(map(str, range(k)), 1)}, 258, 1025),
    "prompts": _limit(TEXT, lambda k: {"prompt": ["a"] * k}, 32, 33),
    "metadata, pairs": _limit(TEXT, lambda k: {"metadata": {str(i): "v" for i in range(k)}}, 16, 17),
    "metadata, name": _limit(TEXT, lambda k: {"metadata": {"k" * k: "v"}}, 64, 65),
    "metadata, value": _limit(TEXT, lambda k: {"metadata": {"k": "v" * k}}, 512, 513),
    "JSON schema, depth": _limit(CHAT, lambda k: {"structured_outputs": {"json": _nested(k)}}, 16, 17),
    "JSON schema, bytes": _limit(CHAT, lambda k: {"structured_outputs": {"json": _of_bytes(k)}}, 16384, 16385),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_request_at_the_limit_is_served_and_one_past_it_refused_at_once(server: RunningServer, limit: str) -> None:
    route, at, past = LIMITS[limit]
    asked = {"messages": HELLO} if route.startswith("chat") else {"prompt": "hello"}
    with httpx2.Client(base_url=f"{server.url}/v1/", timeout=60) as http:
        served = http.post(route, json=asked | {"max_tokens": 2} | at)
        assert served.status_code == 200, served.text
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            refused = http.post(route, json=asked | {"max_tokens": 2} | past)
            seconds.append(time.perf_counter() - began)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] in past
            assert "x-policy-version" not in refused.headers  # no engine was asked
    print(f"{limit}: refused within {1000 * statistics.median(seconds):.1f} ms (median of 5)")
    assert min(seconds) < SECONDS_TO_REFUSE
