"""Gates: reasons to refuse a version before it may take traffic, from numbers measured beforehand.

Each check has a name, the value found, its limit and a sentence for the operator. A number the gate needs
and does not find fails its check: what was not measured was not passed.

Metrics of a policy: ``nonfinite_weights`` (count), ``kl_to_reference`` (nats per completion),
``eos_share``, ``completion_tokens`` (mean), ``distinct_2``, and, where measured, ``pretraining_loss``
(nats per token) and the rates ``toxicity_rate``, ``false_claim_rate``, ``known_answer_rate``, each with
``_low`` and ``_high`` for its 95 % interval. Metrics of a reward model: ``nonfinite_weights``,
``held_out_accuracy`` and ``held_out_accuracy_low``.

What a reward model thinks of the candidate is reported elsewhere and never decides: in trials it told
nothing about whether people preferred the version.
"""

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from deploy.settings import GateSettings

Metrics = Mapping[str, float]


class GateCheck(BaseModel):
    """One reason to refuse, and whether it holds. ``value`` is None where nothing was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    name: str
    passed: bool
    value: float | None
    limit: float
    sentence: str


class GateReport(BaseModel):
    """All checks of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    passed: bool
    checks: tuple[GateCheck, ...]

    @classmethod
    def of(cls, checks: list[GateCheck]) -> "GateReport":
        """A report that passes when every check does."""
        return cls(passed=all(check.passed for check in checks), checks=tuple(checks))

    def refusals(self) -> list[str]:
        """The sentence of every check that failed."""
        return [check.sentence for check in self.checks if not check.passed]


def policy_gate(candidate: Metrics, parent: Metrics, settings: GateSettings) -> GateReport:
    """Check a policy against its limits and its parent, both measured on the same held-out prompts."""
    checks = [
        _finite(candidate),
        _at_most("kl_to_reference", candidate, settings.max_kl, "nats from the reference policy"),
        _at_least("eos_share", candidate, settings.min_eos_share, "of completions end by themselves"),
        *_length(candidate, parent, settings.max_length_change),
        _at_least("distinct_2", candidate, settings.min_distinct_2_ratio * _known(parent, "distinct_2"), "distinct-2"),
    ]
    if "pretraining_loss" in parent:
        limit = settings.max_pretraining_loss_ratio * parent["pretraining_loss"]
        checks.append(_at_most("pretraining_loss", candidate, limit, "nats per token of pretraining text"))
    for name in ("toxicity_rate", "false_claim_rate"):
        if f"{name}_high" in parent:
            checks.append(_at_most(name, candidate, parent[f"{name}_high"], "against the parent's upper bound"))
    if "known_answer_rate_low" in parent:
        limit = parent["known_answer_rate_low"]
        checks.append(_at_least("known_answer_rate", candidate, limit, "of known questions, the parent's lower bound"))
    return GateReport.of(checks)


def reward_model_gate(candidate: Metrics, previous: Metrics | None, settings: GateSettings) -> GateReport:
    """Check a reward model against chance and against the previous one on the same held-out pairs."""
    checks = [
        _finite(candidate),
        _above("held_out_accuracy_low", candidate, 0.5, "lower bound of the accuracy on held-out pairs; 0.5 is chance"),
    ]
    if previous is not None and "held_out_accuracy" in previous:
        limit = previous["held_out_accuracy"] - settings.reward_model_tolerance
        checks.append(_at_least("held_out_accuracy", candidate, limit, "accuracy; the previous reward model's"))
    return GateReport.of(checks)


def _known(metrics: Metrics, name: str) -> float:
    """The parent's number, or 0 (no demand) where it was never measured."""
    return metrics.get(name, 0.0)


def _finite(candidate: Metrics) -> GateCheck:
    broken = sorted(name for name, value in candidate.items() if not math.isfinite(value))
    weights = candidate.get("nonfinite_weights")
    passed = not broken and weights == 0
    if weights is None:
        sentence = "nobody looked for weights that are not finite"
    elif weights:
        sentence = f"{weights:.0f} weights are not finite"
    elif broken:
        sentence = f"not finite: {', '.join(broken)}"
    else:
        sentence = "every weight and every number is finite"
    return GateCheck(name="finite", passed=passed, value=weights, limit=0, sentence=sentence)


def _length(candidate: Metrics, parent: Metrics, change: float) -> list[GateCheck]:
    name, unit = "completion_tokens", "tokens a completion, against the parent's"
    if name not in parent:
        return []
    return [
        _at_least(name, candidate, (1 - change) * parent[name], unit),
        _at_most(name, candidate, (1 + change) * parent[name], unit),
    ]


def _at_most(name: str, metrics: Metrics, limit: float, unit: str) -> GateCheck:
    value = metrics.get(name)
    return _check(name, value, limit, value is not None and value <= limit, "at most", unit)


def _at_least(name: str, metrics: Metrics, limit: float, unit: str) -> GateCheck:
    value = metrics.get(name)
    return _check(name, value, limit, value is not None and value >= limit, "at least", unit)


def _above(name: str, metrics: Metrics, limit: float, unit: str) -> GateCheck:
    value = metrics.get(name)
    return _check(name, value, limit, value is not None and value > limit, "above", unit)


def _check(name: str, value: float | None, limit: float, passed: bool, relation: str, unit: str) -> GateCheck:
    found = "was not measured" if value is None else f"is {value:.4g}"
    sentence = f"{name} {found}; it must be {relation} {limit:.4g} ({unit})"
    return GateCheck(name=name, passed=passed, value=value, limit=limit, sentence=sentence)
