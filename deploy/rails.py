"""Guard rails: a canary that runs worse than the stable version is dropped, whatever people think of its answers.

Each rail compares one share, such as that of failed requests, between the two arms, since the canary began. It is
hit where the canary's share is above the stable version's by more than an allowed rise, with certainty: the lower
bound of one against the upper bound of the other. Both bounds are of confidence *sequences*, which hold at all
times at once, so looking every two seconds costs no certainty. For k of n the bound is where the wealth

    B(k + ½, n − k + ½) / B(½, ½) / (p^k (1 − p)^(n − k))

of betting against p with a Beta(½, ½) mixture reaches 1/α (Robbins 1970, Ann. Math. Stat. 41:1397; Howard et al. 2021,
Ann. Stat. 49:1055, §3.2). It takes requests as independent; ``serve.guard`` counts few of any one user's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import betaln

from deploy.arms import FIRST_TOKEN_SECONDS, ArmFigures
from deploy.settings import RailSettings


@dataclass(frozen=True)
class _Share:
    """``canary`` and ``stable`` are (k, n) each; ``tests`` is how many shares one rail looks at."""

    what: str
    canary: tuple[int, int]
    stable: tuple[int, int]
    max_rise: float
    tests: int = 1


def rail_hit(canary: ArmFigures, stable: ArmFigures, settings: RailSettings) -> str | None:
    """The sentence of the first rail that the canary has hit; None where it runs as it should."""
    for share in _shares(canary, stable, settings):
        (k, n), (k_stable, n_stable) = share.canary, share.stable
        if min(n, n_stable) < settings.min_requests:
            continue
        k, k_stable = min(k, n), min(k_stable, n_stable)  # a server that counts wrongly must not end the others
        alpha = settings.alpha / share.tests / 2  # half for either arm's bound
        if lower_bound(k, n, alpha) > upper_bound(k_stable, n_stable, alpha) + share.max_rise:
            return (
                f"{share.what}: {k} of {n} ({k / n:.1%}), against {k_stable} of {n_stable} ({k_stable / n_stable:.1%}) "
                f"of the stable version; surely more than {share.max_rise:.1%} above it"
            )
    return None


def lower_bound(k: int, n: int, alpha: float) -> float:
    """What the probability behind k of n is at least, at every look with probability 1 − α."""
    return 1.0 - upper_bound(n - k, n, alpha)


def upper_bound(k: int, n: int, alpha: float) -> float:
    """What the probability behind k of n is at most, at every look with probability 1 − α."""
    if k == n:
        return 1.0
    mixture = betaln(k + 0.5, n - k + 0.5) - betaln(0.5, 0.5)

    def beyond(p: float) -> float:
        return float(mixture - k * math.log(p) - (n - k) * math.log1p(-p) + math.log(alpha))

    lowest, highest = k / n or 1e-12, 1.0 - 1e-12
    return float(brentq(beyond, lowest, highest)) if beyond(highest) > 0 else 1.0


def _shares(canary: ArmFigures, stable: ArmFigures, settings: RailSettings) -> Iterator[_Share]:
    yield _Share(
        "requests failed", (canary.errors, canary.requests), (stable.errors, stable.requests), settings.max_error_rise
    )
    for seconds, slow, slow_stable in zip(FIRST_TOKEN_SECONDS, canary.slower, stable.slower, strict=False):
        yield _Share(
            f"first tokens later than {seconds:g} s",
            (slow, canary.timed),
            (slow_stable, stable.timed),
            settings.max_slow_rise,
            tests=len(FIRST_TOKEN_SECONDS),
        )
    yield _Share(
        "completions without an end of their own",
        (canary.unfinished, canary.completions),
        (stable.unfinished, stable.completions),
        settings.max_unfinished_rise,
    )
    yield _Share(
        "completions not recorded",
        (canary.unrecorded, canary.completions),
        (stable.unrecorded, stable.completions),
        settings.max_unrecorded_rise,
    )
