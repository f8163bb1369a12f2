"""A trained policy of any family is served by vLLM as transformers computes it: greedy completions are equal.

The suite serves a tied Llama everywhere else; of the other families the default run starts two, ``make test-models``
the rest.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from improved_policies import PROMPTS, improve
from running_server import start_server
from tiny_policies import EOS, FAMILIES

from deploy.registry import Registry
from deploy.versions import Draft, VersionKind
from feedback.embedded import start_or_join
from train.evaluate import canary_prompts
from train.models import load_policy, load_tokenizer, pad_id_of
from train.sampling import greedy
from train.settings import EvaluateSettings

DEFAULT_RUN = ("gpt2", "qwen2")
TOKENS = 12


@pytest.fixture
def short_state() -> Iterator[Path]:
    """A state directory whose path leaves room for a unix socket."""
    path = Path(tempfile.mkdtemp(prefix="il-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.engine
@pytest.mark.parametrize(
    "family",
    [family if family in DEFAULT_RUN else pytest.param(family, marks=pytest.mark.models) for family in FAMILIES],
)
def test_a_trained_policy_is_served_as_transformers_computes_it(family: str, short_state: Path, tmp_path: Path) -> None:
    improve(tmp_path, family, width=64)  # vLLM's CPU attention supports no heads below 32
    tokenizer, policy = load_tokenizer(tmp_path / "ppo"), load_policy(tmp_path / "ppo")
    expected = greedy(policy, PROMPTS, eos_id=EOS, pad_id=pad_id_of(tokenizer), max_completion_tokens=TOKENS)
    assert len(set(expected.completions)) > 1
    canaries = canary_prompts(EvaluateSettings(), tmp_path / "ppo", PROMPTS[:2])
    Registry(short_state).publish(Draft(kind=VersionKind.POLICY, canary_prompts=canaries), tmp_path / "ppo")
    with start_or_join(short_state) as redis:
        server = start_server(short_state, redis.url, "--policy", "1", INSTRUCTLOOP_SERVE__MAX_MODEL_LEN="64")
        try:
            server.wait_ready()
            body = {"prompt": [list(prompt) for prompt in PROMPTS], "max_tokens": TOKENS, "temperature": 0}
            answer = httpx2.post(f"{server.url}/v1/completions", json={"model": "policy", **body}, timeout=120)
        finally:
            server.process.terminate()
            server.process.wait(60)
    assert answer.status_code == 200, answer.text
    told = [choice["text"].split() for choice in answer.json()["choices"]]
    assert told == [tokenizer.decode(ids, skip_special_tokens=True).split() for ids in expected.completions]
