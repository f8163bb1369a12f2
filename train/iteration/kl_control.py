"""An adaptive coefficient of the KL reward: larger while the policy is further from its reference than wanted.

Ziegler et al. 2019, arXiv 1909.08593, §2.2: a proportional controller in log space. InstructGPT keeps β fixed.
"""

MAX_ERROR = 0.2
"""A KL further than this share from its target moves the coefficient no faster (Ziegler et al. 2019, §2.2)."""


def adapted(kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int) -> float:
    """The coefficient after ``episodes`` were sampled at a distance of ``kl``.

        e = clip(KL / target − 1, −0.2, 0.2),    β ← β (1 + e · episodes / horizon)

    The paper's K_β = 0.1 an iteration is a horizon of ten iterations' episodes.

    Args:
        kl_coef: β that these episodes were rewarded with.
        kl: mean KL to the reference of a completion, nats.
        target: nats per completion that are wanted.
        horizon: episodes in which a constant error of e multiplies β by about exp(e).
        episodes: sampled since the coefficient was last adapted.
    """
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return kl_coef * (1 + error * episodes / horizon)
