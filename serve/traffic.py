"""Which arm serves a request: the stable version, or the canary for its share of traffic."""

import hashlib

from deploy.release import Release


def pick_version(release: Release, principal: str, user: str | None, request_id: str) -> int:
    """The version that serves this request.

    A principal's ``user`` stays on one arm for the life of a canary, because the draw depends on nothing
    else that changes. A request that names no user is drawn on its own id: one anonymous principal would
    otherwise be wholly on one arm.

    Args:
        release: A release with a stable version.
        principal: Who holds the API key.
        user: The request's ``user`` or ``safety_identifier``.
        request_id: The completion's own random id.
    """
    assert release.stable is not None
    if release.canary is None:
        return release.stable
    who = f"{principal}\n{user}" if user is not None else request_id
    drawn = hashlib.sha256(f"{release.canary}\n{who}".encode()).digest()
    share = int.from_bytes(drawn[:8]) / 2**64
    return release.canary if share < release.canary_fraction else release.stable
