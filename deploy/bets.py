"""Betting on a preference: the wealth that the verdict rests on, and the interval that it leaves.

Against "the canary is preferred with probability at most p" a gambler who stakes the fraction κ multiplies his wealth

    by 1 + κ (1 − p) / p for a win and by 1 − κ for a loss,

whose expectation under that claim is at most 1; so is that of the mean over many κ, which spares us choosing one. Such
a wealth ever reaches 1/α with probability at most α, whenever one stops (Ville's inequality; Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", 2023, §4). The p that no gambler has refuted so far make an
interval that holds at all times at once: a confidence sequence.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_STAKES = (np.arange(100) + 0.5) / 100
"""κ, evenly spread: small stakes win where the preference is slight, large ones where it is clear."""
_HALVINGS = 20
"""Of the interval in which a bound is searched: to a millionth."""


def log_wealth(wins: npt.ArrayLike, losses: npt.ArrayLike, margin: npt.ArrayLike = 0.0) -> Floats:
    """Natural log of the mean over all stakes of the wealth after these comparisons (see the module).

    Wealth is a product, so the order of wins and losses does not matter.

    Args:
        wins: [N] or one number.
        losses: likewise.
        margin: m, [N] or one number between −½ and ½: the bets are against p ≤ ½ − m.

    Returns:
        As many numbers.
    """
    against = 0.5 - np.asarray(margin, np.float64)
    of_win = np.log1p(np.multiply.outer((1 - against) / against, _STAKES))
    growth = np.asarray(wins)[..., None] * of_win + np.multiply.outer(losses, np.log1p(-_STAKES))
    most = growth.max(-1)
    found: Floats = most + np.log(np.exp(growth - most[..., None]).mean(-1))
    return found


def preference_bounds(wins: npt.ArrayLike, losses: npt.ArrayLike, alpha: float) -> tuple[Floats, Floats]:
    """Between what probabilities of being preferred no bet has been won yet, after each look.

    Each bound holds at all looks at once with probability 1 − α, both together with 1 − 2α. It excludes ½ from the look
    on at which ``deploy.verdict`` says better or worse.

    Args:
        wins: [N], comparisons won until each look, in the order of the looks.
        losses: [N] likewise; ties are in neither.
        alpha: chance that a bound is ever wrong.

    Returns:
        Lower and upper bounds, [N] each; they only ever come closer.
    """
    low = np.maximum.accumulate(_refuted(wins, losses, alpha))
    high = np.minimum.accumulate(1 - _refuted(losses, wins, alpha))
    return low, high


def _refuted(wins: npt.ArrayLike, losses: npt.ArrayLike, alpha: float) -> Floats:
    """The highest p [N] that the wealth at each look by itself refutes; 0 where it refutes none."""
    needed = math.log(1 / alpha)
    refuted = np.zeros(np.shape(wins))
    beyond = np.ones(np.shape(wins))
    for _ in range(_HALVINGS):
        middle = (refuted + beyond) / 2
        won = log_wealth(wins, losses, 0.5 - middle) >= needed
        refuted, beyond = np.where(won, middle, refuted), np.where(won, beyond, middle)
    return refuted
