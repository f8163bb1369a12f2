"""Every Redis key of ``feedback``: its name, type and lifetime. Nothing else spells one.

| key | type | life |
|---|---|---|
| ``fb:log`` | stream: ``kind id json sha256`` | source of truth, never trimmed; erasing a principal rewrites it |
| ``fb:log:copy`` | stream: the log without the bytes of erased records, in the making | until it replaces ``fb:log`` |
| ``fb:id:<record id>`` | string: stream id | as the record |
| ``fb:idem:<sha256>`` | string: ``<stream id> <body digest>`` | ``idempotency_ttl_seconds`` |
| ``fb:pair:<sha256>`` | string: ``<record id> <task id>``: a labeler's latest on some candidates | as the record |
| ``fb:erasure:lease`` | string: who erases now | ``ERASURE_LEASE_SECONDS``, renewed |
| ``fb:erasure:unfinished`` | set: sha256 of principals whose erasure has begun and not ended | as its members |
| ``fb:probe`` | string: proof that Redis accepts writes | ``PROBE_TTL_SECONDS`` |
| ``gen:<completion id>`` | string: packed StoredCompletion | ``completion_ttl_seconds``; none with ``store: true`` |
| ``gen:by:<principal>`` | zset of completion ids by time: those with ``store: true`` | as its members |
| ``task:<task id>`` | string: packed BlindTask | ``task_ttl_seconds`` |
| ``task:seen:<sha256>`` | set: digests of the prompts a labeler was given | ``labeler_memory_seconds``, renewed |
| ``task:given:<sha256>`` | list of a labeler's task ids, newest first | ``task_ttl_seconds``, renewed |
| ``pool:prompts`` | zset of completion ids by informativeness, nats | trimmed to ``pool_prompts`` members |
| ``pool:golden`` | zset of ids of golden comparisons by number of candidates | as its members |
| ``pool:golden:cursor`` | string: stream id up to which the log was looked through for them | as the log |
| ``auth:key:<sha256>`` | hash, the fields of ApiKey: never the key itself | for ever, revoked or not |
| ``auth:keys`` | set: the sha256 of every key ever made | for ever |
| ``rl:<principal>:requests:<minute>`` | int: requests admitted in that minute of unix time | ``RATE_TTL_SECONDS`` |
| ``rl:<principal>:tokens:<minute>`` | int: tokens sampled in it | ``RATE_TTL_SECONDS`` |

The keys ``rel:*`` and ``train:*`` belong to ``deploy.registry``.
"""

import hashlib
from typing import Literal

API_KEYS = "auth:keys"
COMPLETIONS_PATTERN = "gen:*"
ERASURE_LEASE = "fb:erasure:lease"
ERASURE_LEASE_SECONDS = 20
ERASURES_UNFINISHED = "fb:erasure:unfinished"
GOLDEN = "pool:golden"
GOLDEN_CURSOR = "pool:golden:cursor"
IDEMPOTENCY_PATTERN = "fb:idem:*"
LOG = "fb:log"
LOG_COPY = "fb:log:copy"
POOL = "pool:prompts"
PROBE = "fb:probe"
PROBE_TTL_SECONDS = 60
RATE_TTL_SECONDS = 120
TASKS_PATTERN = "task:*"


def stream_id(record_id: str) -> str:
    """Where a record stands in the log."""
    return f"fb:id:{record_id}"


def idempotency(principal: str, key: str | None, body_digest: str) -> str:
    """What a principal's key (or, without one, the body itself) was first answered with."""
    named = f"key {key}" if key is not None else f"body {body_digest}"
    return f"fb:idem:{_sha256(principal, named)}"


def latest(judged_key: str, *, check: bool = False) -> str:
    """The record in force for ``Comparison.candidates_key()`` or ``Rating.choice_key()``.

    Checks (``feedback.controls``) have keys of their own: none replaces the golden answer that it is held against.
    """
    return f"fb:pair:{_sha256('check', judged_key) if check else judged_key}"


def completion(completion_id: str) -> str:
    """A stored completion."""
    return f"gen:{completion_id}"


def completions_of(principal: str) -> str:
    """The completions a principal asked to keep."""
    return f"gen:by:{principal}"


def task(task_id: str) -> str:
    """A blind task."""
    return f"task:{task_id}"


def given_prompts(labeler: str) -> str:
    """The prompts a labeler was given, and ids of pooled completions that have no other."""
    return f"task:seen:{_sha256(labeler)}"


def given_tasks(labeler: str) -> str:
    """The tasks a labeler was given that may be repeated."""
    return f"task:given:{_sha256(labeler)}"


def api_key(sha256: str) -> str:
    """An API key, by the digest of its text."""
    return f"auth:key:{sha256}"


def rate(principal: str, kind: Literal["requests", "tokens"], minute: int) -> str:
    """What a principal has used in one minute."""
    return f"rl:{principal}:{kind}:{minute}"


def _sha256(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8) + part.encode())  # lengths keep ("a", "bc") from ("ab", "c")
    return digest.hexdigest()
