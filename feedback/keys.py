"""Every Redis key of ``feedback``: its name, type and lifetime. Nothing else spells one.

| key | type | life |
|---|---|---|
| ``fb:log`` | stream: ``kind id json sha256`` | source of truth, never trimmed |
| ``fb:id:<record id>`` | string: stream id | as the record |
| ``fb:idem:<sha256>`` | string: ``<stream id> <body digest>`` | ``idempotency_ttl_seconds`` |
| ``fb:pair:<sha256>`` | string: latest comparison id of one labeler on one set of candidates | as the record |
| ``fb:probe`` | string: proof that Redis accepts writes | ``PROBE_TTL_SECONDS`` |
| ``gen:<completion id>`` | string: packed StoredCompletion | ``completion_ttl_seconds``; none with ``store: true`` |
| ``gen:by:<principal>`` | zset of completion ids by time: those with ``store: true`` | as its members |
| ``task:<task id>`` | string: packed BlindTask | ``task_ttl_seconds`` |
| ``pool:prompts`` | zset of completion ids by time: prompts for labelers | trimmed to ``pool_prompts`` members |

The keys ``rel:*`` and ``train:*`` belong to ``deploy.registry``.
"""

import hashlib

LOG = "fb:log"
POOL = "pool:prompts"
PROBE = "fb:probe"
PROBE_TTL_SECONDS = 60


def stream_id(record_id: str) -> str:
    """Where a record stands in the log."""
    return f"fb:id:{record_id}"


def idempotency(principal: str, key: str | None, body_digest: str) -> str:
    """What a principal's key (or, without one, the body itself) was first answered with."""
    named = f"key {key}" if key is not None else f"body {body_digest}"
    return f"fb:idem:{_sha256(principal, named)}"


def latest_comparison(candidates_key: str) -> str:
    """The comparison in force for ``Comparison.candidates_key()``."""
    return f"fb:pair:{candidates_key}"


def completion(completion_id: str) -> str:
    """A stored completion."""
    return f"gen:{completion_id}"


def completions_of(principal: str) -> str:
    """The completions a principal asked to keep."""
    return f"gen:by:{principal}"


def task(task_id: str) -> str:
    """A blind task."""
    return f"task:{task_id}"


def _sha256(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8) + part.encode())  # lengths keep ("a", "bc") from ("ab", "c")
    return digest.hexdigest()
