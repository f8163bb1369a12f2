"""What the tests of the feedback routes share; their fixtures are in ``feedback_fixtures``."""

from typing import Any

import httpx2
import pytest

COMPARISONS, RATINGS = "/v1/feedback/comparisons", "/v1/feedback/ratings"
DEMONSTRATIONS, SUMMARY = "/v1/feedback/demonstrations", "/v1/feedback/summary"
ROOT = {"authorization": "Bearer root"}
UNDEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
"""For the tests of this app: serve.services names the fleet, and so imports vLLM, which imports what torch deprecates;
inside a test, where this one warning can be let through."""


async def rate(http: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    return await http.post(RATINGS, json={"completion_id": "chatcmpl-1", "index": 0} | body)
