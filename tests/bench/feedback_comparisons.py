"""The comparisons the benchmark posts and appends: all distinct, so that none is a replay, and all of one size."""

import json
import time

from feedback.records import Candidate, Comparison, Prompt, new_id

_PROMPT = "Question %s: why does the light of an old lighthouse turn, and who wound it up before electricity?"
_COMPLETIONS = (
    "Answer %s: the lamp floats in a bath of mercury and is turned by a falling weight, as in a clock. A keeper wound "
    "it up every few hours of the night, so that ships saw the flashes in their right order.",
    "Answer %s: it turns because it is old. Lighthouses have always turned, and nobody knows who began with it; most "
    "people think that the wind does it, or that the sea does, and perhaps both of them are right.",
)
_LABELERS = 100
_NUMBER = "%09d"

_BODY = json.dumps(
    {
        "prompt": _PROMPT % _NUMBER,
        "completions": [text % _NUMBER for text in _COMPLETIONS],
        "preferred": 0,
        "labeler": "L-%02d",
    }
).encode()
_REQUEST = (
    b"POST /v1/feedback/comparisons HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    b"content-length: " + str(len(_BODY % (0, 0, 0, 0))).encode() + b"\r\n\r\n" + _BODY
)


def comparison_request(number: int) -> bytes:
    """The bytes of a request that posts the comparison of that number, below a thousand million."""
    return _REQUEST % (number, number, number, number % _LABELERS)


def comparison(number: int) -> Comparison:
    """The record that the server makes of the same post."""
    name = _NUMBER % number
    return Comparison(
        id=new_id("cmp_"),
        created=time.time(),
        principal="local",
        labeler=f"L-{number % _LABELERS:02d}",
        prompt=Prompt(text=_PROMPT % name),
        source="outside",
        candidates=tuple(Candidate(text=text % name, index=index) for index, text in enumerate(_COMPLETIONS)),
        ranking=((0,), (1,)),
    )
