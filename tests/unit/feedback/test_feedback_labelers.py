import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit
from scipy.stats import binomtest

from feedback.labelers import (
    NOMINAL,
    PRIOR_WEIGHT,
    CrowdReport,
    LabelerReport,
    assess,
    candidate_keys,
    fair_coin_p,
    krippendorff_alpha,
    weights,
)
from feedback.records import Candidate, Comparison, Prompt

# 12 units by 4 observers, 0 where missing: Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
# Two observers, binary, nothing missing: the same paper, section A.
BINARY = [[1, 2, 1, 1, 1, 1, 1, 1, 2, 1], [2, 2, 2, 1, 1, 2, 1, 1, 1, 1]]

CROWD = [0.95] * 6 + [0.9] * 6 + [0.8] * 6 + [0.7] * 4 + [0.5] * 5 + [0.1] * 3
"""Careful, middling, guessing (five) and inverting (three) labelers."""


def counted(answers: list[list[int]], categories: int) -> npt.NDArray[np.float64]:
    return np.array([[row.count(c + 1) for c in range(categories)] for row in zip(*answers, strict=True)], float)


def said(
    labeler: str, ranking: Sequence[Sequence[int]], *texts: str, source: str = "task", duration_ms: int | None = None
) -> Comparison:
    return Comparison.model_validate(
        {
            "id": "cmp_1",
            "created": 1.0,
            "principal": "alice",
            "labeler": labeler,
            "prompt": Prompt(text="frog"),
            "source": source,
            "candidates": [Candidate(text=text) for text in texts],
            "ranking": ranking,
            "duration_ms": duration_ms,
        }
    )


class Simulation:
    """A seeded crowd. Scores are N(0, 1.5²); with probability η a labeler says what Bradley–Terry draws."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.comparisons: list[Comparison] = []
        self.scores: dict[str, float] = {}

    def pairs(
        self, eta: Sequence[float], prompts: int, judges: int, *, takes_first: Sequence[float] = ()
    ) -> "Simulation":
        """``judges`` labelers on one pair of each prompt; labeler k takes the first shown with ``takes_first[k]``."""

        def choose(labeler: int, scores: npt.NDArray[np.float64]) -> list[int]:
            if takes_first and self.rng.random() < takes_first[labeler]:
                return [0, 1]
            meant = self.rng.random() < expit(scores[0] - scores[1])
            return [0, 1] if meant == (self.rng.random() < eta[labeler]) else [1, 0]

        return self._ask(len(eta), prompts, 2, judges, choose)

    def rankings(self, noise: Sequence[float], prompts: int, k: int, judges: int) -> "Simulation":
        """Rankings of ``k`` by score + N(0, noise²); a negative noise ranks upside down."""

        def rank(labeler: int, scores: npt.NDArray[np.float64]) -> list[int]:
            seen = np.sign(noise[labeler]) * scores + self.rng.normal(0, abs(noise[labeler]), len(scores))
            return [int(place) for place in np.argsort(-seen)]

        return self._ask(len(noise), prompts, k, judges, rank)

    def _ask(
        self,
        labelers: int,
        prompts: int,
        k: int,
        judges: int,
        answer: Callable[[int, npt.NDArray[np.float64]], list[int]],
    ) -> "Simulation":
        for number in range(prompts):
            scores = self.rng.normal(0, 1.5, k)
            for labeler in self.rng.choice(labelers, judges, replace=False):
                shown = self.rng.permutation(k)
                ranking = [[place] for place in answer(labeler, scores[shown])]
                one = said(f"{labeler:03d}", ranking, *(f"{number}-{index}" for index in shown))
                self.comparisons.append(one)
                self.scores |= dict(zip(candidate_keys(one), scores[shown].tolist(), strict=True))
        return self


def in_order(report: CrowdReport) -> list[LabelerReport]:
    return [report.labelers[name] for name in sorted(report.labelers)]


def recovered(report: CrowdReport) -> npt.NDArray[np.float64]:
    return np.array([one.reliability.value for one in in_order(report)])


def covered(report: CrowdReport, eta: Sequence[float]) -> list[bool]:
    return [
        one.reliability.low <= true <= one.reliability.high for one, true in zip(in_order(report), eta, strict=True)
    ]


def test_alpha_of_published_examples() -> None:
    grades = np.arange(5.0)
    assert krippendorff_alpha(counted(PUBLISHED, 5), 1 - np.eye(5)) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(counted(PUBLISHED, 5), np.subtract.outer(grades, grades) ** 2) == pytest.approx(
        0.849, abs=5e-4
    )
    assert krippendorff_alpha(counted(BINARY, 2), 1 - np.eye(2)) == pytest.approx(0.095, abs=5e-4)


def test_alpha_by_hand_and_whichever_candidate_is_first() -> None:
    # Two agree on one item and not on the other. Coincidences over (first, second), both orders: 1 1 / 1 1;
    # observed disagreement 2/4, expected 2·2·2 / (4·3).
    counts = np.array([[2.0, 0, 0], [1, 0, 1]])
    assert krippendorff_alpha(counts, NOMINAL, mirrored=True) == pytest.approx(1 - (2 / 4) / (8 / 12))
    turned = np.array([[0.0, 0, 2], [1, 0, 1]])
    assert krippendorff_alpha(turned, NOMINAL, mirrored=True) == krippendorff_alpha(counts, NOMINAL, mirrored=True)
    assert krippendorff_alpha(turned, NOMINAL) == krippendorff_alpha(counts, NOMINAL) == 0


def test_alpha_at_the_edges() -> None:
    assert krippendorff_alpha(np.array([[3.0, 0, 0], [0, 0, 2]]), NOMINAL) == 1
    assert np.isnan(krippendorff_alpha(np.array([[1.0, 0, 0], [0, 1, 0]]), NOMINAL))
    assert np.isnan(krippendorff_alpha(np.array([[2.0, 0, 0], [2, 0, 0]]), NOMINAL))


def test_agreement_by_hand() -> None:
    report = assess(
        [
            said("ann", [[0], [1]], "a", "b"),
            said("bob", [[1], [0]], "b", "a"),  # the same, shown the other way round
            said("cat", [[0, 1]], "a", "b"),
            said("ann", [[0], [1]], "c", "d"),  # nobody else's
        ]
    )
    assert report.agreement is not None
    assert report.agreement.value == pytest.approx(1 / 3)
    assert report.agreement.n == 1
    shares = {name: one.agreement.value for name, one in report.labelers.items() if one.agreement}
    assert shares == {"ann": 1 / 2, "bob": 1 / 2, "cat": 0}
    ann = report.labelers["ann"]
    assert (ann.comparisons, ann.pairs, ann.ties, report.labelers["cat"].ties) == (2, 2, 0, 1)


def test_one_labeler_does_not_agree_with_themselves() -> None:
    report = assess([said("ann", [[0], [1]], "a", "b"), said("ann", [[0], [1], [2]], "a", "b", "c")])
    assert report.agreement is None
    assert report.labelers["ann"].agreement is None
    assert report.labelers["ann"].weight == PRIOR_WEIGHT


def test_pairs_of_one_ranking_count_as_fewer_judgements() -> None:
    ranked = [said(name, [[0], [1], [2], [3]], *"abcd") for name in ("ann", "bob")]
    report = assess(ranked)
    assert report.agreement is not None
    assert (report.agreement.value, report.agreement.n) == (1, 3)  # K − 1, not C(4, 2)


def test_the_order_of_comparisons_and_of_candidates_does_not_matter() -> None:
    asked = Simulation(1).rankings([0.3] * 5 + [2.0] * 5 + [-0.5], prompts=60, k=3, judges=3).comparisons
    plain = assess(asked)
    turned = [
        one.model_copy(
            update={
                "candidates": one.candidates[::-1],
                "ranking": tuple(tuple(2 - index for index in group) for group in one.ranking),
            }
        )
        for one in asked
    ]
    random.Random(2).shuffle(turned)
    again = assess(turned)
    assert recovered(again) == pytest.approx(recovered(plain), abs=1e-9)
    assert again.alpha == pytest.approx(plain.alpha)
    assert again.alpha_ordinal == pytest.approx(plain.alpha_ordinal)
    assert again.agreement and plain.agreement
    assert again.agreement.value == pytest.approx(plain.agreement.value)
    for name, one in plain.labelers.items():
        turned_share = again.labelers[name].first_shown
        assert one.first_shown and turned_share
        assert turned_share.value == pytest.approx(1 - one.first_shown.value)


def test_reliability_is_recovered_with_guessers_and_inverters_among_the_crowd() -> None:
    true, figures, inside = np.array(CROWD), [], []
    for seed in range(8):
        report = assess(Simulation(seed).pairs(CROWD, prompts=1500, judges=5).comparisons)
        found = recovered(report)
        figures.append((np.corrcoef(found, true)[0, 1], np.abs(found - true).max(), (found - true).mean()))
        inside += covered(report, CROWD)
        guess, invert = in_order(report)[22:27], in_order(report)[27:]
        assert all(one.reliability.high < 0.5 and one.weight == 0 for one in invert)
        assert all(one.weight < 0.45 for one in guess)
        assert np.mean([one.weight for one in guess]) < 0.2
        assert min(one.weight for one in in_order(report)[:6]) > 0.6
    correlation, largest, bias = np.mean(figures, axis=0)
    assert correlation > 0.96  # found: 0.978
    assert largest < 0.2  # 0.138, about 250 judgements a labeler
    assert abs(bias) < 0.03  # 0.011
    assert np.mean(inside) > 0.9  # 0.946


def test_intervals_hold_the_truth_for_labelers_like_the_prior() -> None:
    inside, errors = [], []
    for seed in range(12):
        eta = np.random.default_rng(1000 + seed).beta(4, 1, 30).tolist()
        report = assess(Simulation(seed).pairs(eta, prompts=600, judges=3).comparisons)
        inside += covered(report, eta)
        errors.append(np.abs(recovered(report) - eta).mean())
    assert np.mean(inside) > 0.88  # found: 0.908
    assert np.mean(errors) < 0.1  # 0.091, 60 judgements a labeler


def test_position_bias_is_found_and_costs_weight() -> None:
    takes_first = [0.0] * 15 + [0.6] * 5
    eta = [0.9] * 20
    report = assess(Simulation(3).pairs(eta, prompts=1200, judges=5, takes_first=takes_first).comparisons)
    honest, biased = in_order(report)[:15], in_order(report)[15:]
    assert all(one.first_shown_p < 1e-6 for one in biased)
    assert all(one.first_shown_p > 1e-3 for one in honest)
    # The first is taken with 0.6, and half of the other times it is the better one.
    shares = [one.first_shown.value for one in biased if one.first_shown]
    assert np.mean(shares) == pytest.approx(0.6 + 0.4 / 2, abs=0.03)
    # Of the times the first is taken, half are right by chance.
    assert covered(report, [0.9] * 15 + [0.6 / 2 + 0.4 * 0.9] * 5).count(True) >= 18
    assert max(one.weight for one in biased) < min(one.weight for one in honest)


def test_noisier_rankings_make_less_reliable_labelers() -> None:
    noise = [0.3] * 8 + [2.0] * 8 + [50.0] * 4 + [-0.5] * 2
    found = recovered(assess(Simulation(4).rankings(noise, prompts=250, k=4, judges=3).comparisons))
    sharp, dull, guess, upside_down = found[:8], found[8:16], found[16:20], found[20:]
    assert sharp.min() > dull.max() > guess.max() > 0.5 > upside_down.max()
    assert guess.mean() < 0.7


def test_a_labeler_nobody_checks_keeps_the_prior() -> None:
    report = assess(Simulation(5).rankings([0.3, 50.0, -0.5], prompts=90, k=4, judges=1).comparisons)
    assert weights(report) == dict.fromkeys(["000", "001", "002"], pytest.approx(PRIOR_WEIGHT))
    assert all(one.reliability.n == pytest.approx(0, abs=1e-9) for one in in_order(report))


def test_outside_scores_stand_in_for_other_labelers() -> None:
    asked = Simulation(6).pairs(CROWD, prompts=4500, judges=1)
    rng = np.random.default_rng(7)
    scores = {key: score + rng.normal(0, 0.7) for key, score in asked.scores.items()}
    report = assess(asked.comparisons, scores=scores)
    found = recovered(report)
    assert np.corrcoef(found, CROWD)[0, 1] > 0.95
    assert np.mean(covered(report, CROWD)) > 0.8
    assert found[27:].max() < 0.5 < found[:22].min()


def test_golden_items() -> None:
    good, bad = [[0], [1]], [[1], [0]]
    asked = [said(name, said_, f"{n}+", f"{n}-") for n in range(20) for name, said_ in (("ann", good), ("bob", bad))]
    keys = [candidate_keys(one) for one in asked[::2]]
    golden: dict[frozenset[str], str | None] = {frozenset(pair): pair[0] for pair in keys}
    report = assess(asked, golden=golden)
    ann, bob = report.labelers["ann"], report.labelers["bob"]
    assert ann.golden and (ann.golden.value, ann.golden.n) == (1, 20)
    assert bob.golden and bob.golden.value == 0
    # Known answers make η a plain Beta posterior: (4 + 20) / (5 + 20) and 4 / 25.
    assert ann.reliability.value == pytest.approx(24 / 25, abs=2e-3)
    assert bob.reliability.value == pytest.approx(4 / 25, abs=2e-3)
    with pytest.raises(ValueError, match="one of them"):
        assess(asked, golden={frozenset(keys[0]): "another"})


def test_ties_between_equals_say_nothing_of_who_ties() -> None:
    report = assess([said(name, [[0, 1]], f"{n}a", f"{n}b") for n in range(40) for name in ("ann", "bob")])
    assert weights(report) == dict.fromkeys(["ann", "bob"], pytest.approx(PRIOR_WEIGHT))
    assert report.agreement and report.agreement.value == 1


def test_position_counts_blind_tasks_only() -> None:
    report = assess(
        [
            said("ann", [[0], [1]], "a", "b"),
            said("ann", [[0], [1], [2]], "c", "d", "e"),
            said("ann", [[1], [0]], "f", "g"),
            said("ann", [[0, 1]], "h", "i"),
            said("ann", [[1], [0]], "j", "k", source="candidates"),
        ]
    )
    ann = report.labelers["ann"]
    assert ann.first_shown and (ann.first_shown.value, ann.first_shown.n) == (2 / 3, 3)
    assert ann.first_shown_p == 1


@pytest.mark.parametrize("tosses", [1, 2, 7, 100, 101, 2000])
def test_a_fair_coins_p_value_is_that_of_the_exact_test(tosses: int) -> None:
    for heads in {0, 1, tosses // 3, tosses // 2, tosses - tosses // 2, tosses}:
        assert fair_coin_p(heads, tosses) == pytest.approx(binomtest(heads, tosses).pvalue, rel=1e-9)
    assert fair_coin_p(0, 0) == 1


def test_speed() -> None:
    times = {"slow": 40_000, "ann": 9_000, "bob": 10_000, "cat": 11_000, "fast": 200}
    report = assess([said(name, [[0], [1]], "a" * 500, "b" * 500, duration_ms=ms) for name, ms in times.items()])
    speed = {name: one.speed for name, one in report.labelers.items()}
    # Medians of log time: middle log 10 000, deviations log(10/9) and log(1.1) about it, their median log(10/9).
    assert speed["slow"] == pytest.approx(np.log(4) / (1.4826 * np.log(10 / 9)))
    assert speed["bob"] == 0
    fast = report.labelers["fast"]
    assert fast.speed is not None and fast.speed < -20
    # 1 000 characters in less than ten seconds cannot have been read.
    shares = {name: one.too_fast.value for name, one in report.labelers.items() if one.too_fast}
    assert shares == {"slow": 0, "ann": 1, "bob": 0, "cat": 0, "fast": 1}


def test_untimed_and_absent_labelers() -> None:
    report = assess([said("ann", [[0], [1]], "a", "b")])
    ann = report.labelers["ann"]
    assert (ann.speed, ann.too_fast, ann.golden) == (None, None, None)
    assert assess([]).labelers == {}
    same_text_twice = assess([said("ann", [[0], [1]], "a", "a")])
    assert same_text_twice.labelers["ann"].pairs == 0
