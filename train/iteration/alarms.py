"""Numbers of a PPO run that sound training rules out, and at which it is stopped rather than finished.

Each alarm is a pure check of the history of iterations against a limit (``AlarmSettings``). One bad iteration is
chance; what is beyond its limit ``patience`` iterations in a row is not. A run that is stopped leaves its resume
point, whose history raises the same alarm again until the limit is changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from train.errors import AlarmRaised
from train.settings import AlarmSettings

ROUNDING = 1e-3
"""Nats of KL per completion that the errors of fp32 may make up, where policy and reference are the same."""

History = Sequence[Mapping[str, float]]
"""The numbers of each iteration, oldest first, as ``ppo.run`` keeps them."""


@dataclass(frozen=True)
class Alarm:
    """One number beyond its limit.

    Attributes:
        name: which alarm.
        number: what was found.
        limit: what it may be at worst.
        sentence: what that means, and the setting that holds the limit.
    """

    name: str
    number: float
    limit: float
    sentence: str

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence} ({self.number:.4g}, limit {self.limit:.4g})"


def check(settings: AlarmSettings, history: History, sampler_gap: float) -> list[Alarm]:
    """The alarms that a run raises.

    Args:
        settings: the limits.
        history: of the run so far; the newest iterations decide.
        sampler_gap: the most so far by which sampler and trainer differed in a token's log-probability, nats.
    """
    if not settings.patience:
        return []
    found = [_sampler(settings, sampler_gap), *(alarm(settings, history) for alarm in _ALARMS)]
    return [alarm for alarm in found if alarm is not None]


def refuse(raised: Sequence[Alarm]) -> None:
    """Raise AlarmRaised, with every reason, where there is an alarm."""
    if raised:
        raise AlarmRaised(
            "PPO stopped: " + "; ".join(map(str, raised)) + ". A limit is changed under ppo.alarms; the run then goes "
            "on from its resume point, where it has one"
        )


def _sampler(settings: AlarmSettings, sampler_gap: float) -> Alarm | None:
    """No matter of chance: one token is enough."""
    if sampler_gap <= settings.max_sampler_gap:
        return None
    return Alarm(
        "sampler gap",
        sampler_gap,
        settings.max_sampler_gap,
        "sampler and trainer differ in the log-probability of a token, nats: they do not see the same policy, or at "
        "another temperature or precision (max_sampler_gap)",
    )


def _negative_kl(settings: AlarmSettings, history: History) -> Alarm | None:
    """k1 is an unbiased estimate of a KL divergence: its mean may be below 0 by chance only."""
    recent = history[-settings.patience :]
    if len(recent) < settings.patience:
        return None
    error = sum(numbers["kl_se"] ** 2 for numbers in recent) ** 0.5 / len(recent)
    found, limit = fmean(_of("kl_to_reference", recent)), -settings.negative_kl_errors * error - ROUNDING
    if found >= limit:
        return None
    return Alarm(
        "negative KL",
        found,
        limit,
        f"the mean KL to the reference over {len(recent)} iterations is further below 0 than chance allows: the "
        "log-probabilities are not those of the policy that sampled (negative_kl_errors)",
    )


def _far(settings: AlarmSettings, history: History) -> Alarm | None:
    if settings.max_kl is None:
        return None
    return _lasting(
        "KL drift",
        _of("kl_to_reference", history),
        settings,
        highest=settings.max_kl,
        sentence="the policy is so far from its reference, nats per completion, that reward models mislead (max_kl)",
    )


def _explained_variance(settings: AlarmSettings, history: History) -> Alarm | None:
    learning = [numbers for numbers in history if numbers["policy_updates"]]
    return _lasting(
        "explained variance",
        _of("explained_variance", learning),
        settings,
        lowest=settings.min_explained_variance,
        sentence="the value model stays worse than a constant, so advantages are noise: more value_only_iterations or "
        "another value_lr may help (min_explained_variance)",
    )


def _entropy(settings: AlarmSettings, history: History) -> Alarm | None:
    entropies = _of("entropy", history)
    return _lasting(
        "entropy collapse",
        entropies,
        settings,
        lowest=settings.min_entropy_share * _first(entropies),
        sentence="the policy says nearly the same whatever it is asked, nats per token (min_entropy_share of the "
        "first iteration's)",
    )


def _eos(settings: AlarmSettings, history: History) -> Alarm | None:
    shares = _of("eos_share", history)
    return _lasting(
        "EOS loss",
        shares,
        settings,
        lowest=settings.min_eos_share * _first(shares),
        sentence="the policy no longer ends its completions (min_eos_share of the first iteration's share)",
    )


def _longer(settings: AlarmSettings, history: History) -> Alarm | None:
    lengths = _of("completion_tokens", history)
    return _lasting(
        "length drift",
        lengths,
        settings,
        highest=settings.max_length_ratio * _first(lengths),
        sentence="completions have become too long, mean tokens (max_length_ratio times the first iteration's)",
    )


def _shorter(settings: AlarmSettings, history: History) -> Alarm | None:
    lengths = _of("completion_tokens", history)
    return _lasting(
        "length drift",
        lengths,
        settings,
        lowest=_first(lengths) / settings.max_length_ratio,
        sentence="completions have become too short, mean tokens (the first iteration's over max_length_ratio)",
    )


_ALARMS: tuple[Callable[[AlarmSettings, History], Alarm | None], ...] = (
    _negative_kl,
    _far,
    _explained_variance,
    _entropy,
    _eos,
    _longer,
    _shorter,
)


def _lasting(
    name: str,
    series: Sequence[float],
    settings: AlarmSettings,
    *,
    sentence: str,
    lowest: float = float("-inf"),
    highest: float = float("inf"),
) -> Alarm | None:
    """An alarm with the newest of ``series``, where each of the last ``patience`` is outside lowest … highest."""
    recent = series[-settings.patience :]
    if len(recent) < settings.patience or any(lowest <= number <= highest for number in recent):
        return None
    return Alarm(name, recent[-1], lowest if recent[-1] < lowest else highest, sentence)


def _of(name: str, history: History) -> list[float]:
    return [numbers[name] for numbers in history if name in numbers]


def _first(series: Sequence[float]) -> float:
    return series[0] if series else 0.0
