"""pass@k, votes and bootstrap against closed forms and enumeration of all resamples."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from jaxstack.reasoning.statistics import (
    Interval,
    _resampled_means,
    bootstrap_mean,
    majority_vote,
    paired_bootstrap,
    pass_at_k,
    rule_of_three,
)
from jaxstack.runtime.errors import UserError


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == float(Fraction(sum(any(s) for s in subsets), len(subsets))), (n, c, k)


def test_pass_at_k_in_closed_form():
    assert pass_at_k(200, 13, 1) == 13 / 200
    assert pass_at_k(1000, 0, 500) == 0.0 and pass_at_k(1000, 501, 500) == 1.0
    assert pass_at_k(2000, 1, 1999) == pytest.approx(1999 / 2000, abs=1e-15)
    for wrong in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(UserError, match="pass@k: found"):
            pass_at_k(*wrong)


def test_majority_vote():
    assert majority_vote(["7", "5", "5"]) == 1
    assert majority_vote(["7", "5", "5", "7"]) == 0  # a tie goes to what was said first
    assert majority_vote([None, None, None, "9"]) == 3  # abstentions do not win
    assert majority_vote([None, None]) is None and majority_vote([]) is None


def test_rule_of_three_bounds_the_exact_one():
    for trials in (10, 100, 512, 10_000):
        exact = 1 - 0.05 ** (1 / trials)  # no event in so many trials has a chance of 5 %
        assert exact < rule_of_three(trials) < exact * 1.17
    assert rule_of_three(2) == 1.0
    with pytest.raises(UserError, match="found 0 trials"):
        rule_of_three(0)


@pytest.mark.parametrize("clusters", [None, "aabbb", "abacc"])
def test_resamples_are_those_of_the_enumeration(clusters: str | None):
    """Every resample of clusters and of seeds, with its probability, against 40,000 drawn ones."""
    values = np.array([[1, 0, 0, 1, 3], [0, 0, 1, 1, -1]], np.float64)
    names = list(dict.fromkeys(clusters)) if clusters else list(range(5))
    members = [[i for i in range(5) if (clusters[i] if clusters else i) == name] for name in names]
    exact: Counter[float] = Counter()
    weight = Fraction(1, len(names) ** len(names) * 4)
    for drawn in itertools.product(range(len(names)), repeat=len(names)):
        columns = [i for cluster in drawn for i in members[cluster]]
        for rows in itertools.product(range(2), repeat=2):
            exact[round(float(values[np.ix_(rows, columns)].mean()), 9)] += weight
    sums = np.stack([[row[m].sum() for m in members] for row in values])
    sizes = np.array([len(m) for m in members])
    found = Counter(np.round(_resampled_means(sums, sizes, 40_000, np.random.default_rng(0)), 9).tolist())
    assert set(found) <= set(exact)
    for value, chance in exact.items():
        deviation = math.sqrt(float(chance * (1 - chance)) / 40_000)
        assert abs(found[value] / 40_000 - float(chance)) < 4.5 * deviation, value


def test_interval_of_a_binomial_rate():
    """The bootstrap of a rate is Binomial(n, p) / n: its quantiles in closed form."""
    n, hits = 400, 120
    interval = bootstrap_mean(np.arange(n) < hits)
    cdf, low, high = 0.0, None, None
    for k in range(n + 1):
        cdf += math.comb(n, k) * 0.3**k * 0.7 ** (n - k)
        low = k / n if low is None and cdf >= 0.025 else low
        high = k / n if high is None and cdf >= 0.975 else high
    assert low is not None and high is not None
    assert interval.mean == 0.3
    assert abs(interval.low - low) <= 1 / n + 1e-12 and abs(interval.high - high) <= 1 / n + 1e-12


def test_pairs_cancel_what_both_share():
    rng = np.random.default_rng(3)
    hard = rng.random(300) < 0.5
    a, b = ~hard, ~hard & (rng.random(300) < 0.95)
    paired = paired_bootstrap(a, b)
    assert paired.mean == pytest.approx(a.mean() - b.mean()) and 0 < paired.low < paired.mean < paired.high < 0.08
    unpaired = paired_bootstrap(a, rng.permutation(b))
    assert unpaired.high - unpaired.low > 3 * (paired.high - paired.low)
    swapped = paired_bootstrap(b, a)
    assert swapped.low == pytest.approx(-paired.high) and swapped.high == pytest.approx(-paired.low)


def test_seeds_that_disagree_and_clusters_widen_the_interval():
    rng = np.random.default_rng(4)
    a = np.stack([rng.random(200) < 0.9, rng.random(200) < 0.6])
    b = np.zeros((2, 200), bool)
    both = paired_bootstrap(a, b)
    alone = bootstrap_mean(a.mean(0))
    assert both.mean == alone.mean and both.high - both.low > 3 * (alone.high - alone.low)
    values = np.repeat(rng.random(50) < 0.5, 4)
    narrow, wide = bootstrap_mean(values), bootstrap_mean(values, clusters=[i // 4 for i in range(200)])
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.0, rel=0.1)  # sqrt(4)


def test_many_problems_do_not_fit_in_one_draw():
    values = np.random.default_rng(5).random(14_042) < 0.7
    interval = bootstrap_mean(values, n=600)
    error = math.sqrt(0.21 / 14_042)
    assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1.0, rel=0.12)


def test_no_variation_is_said():
    same = paired_bootstrap(np.ones(512, bool), np.ones(512, bool))
    assert same == Interval(0.0, 0.0, 0.0) and same.degenerate
    assert same.describe(512) == "0.000 [0.000, 0.000] (no variation in 512: within 0.00586)"
    assert Interval(0.1, 0.2, 0.3).describe(512) == "0.200 [0.100, 0.300]"
    assert paired_bootstrap(np.arange(9) % 2, np.arange(9) % 3, seed=1) == paired_bootstrap(
        np.arange(9) % 2, np.arange(9) % 3, seed=1
    )


@pytest.mark.parametrize(
    ("a", "b", "clusters", "message"),
    [
        ([1, 0], [1, 0, 1], None, r"found shapes \(2,\) and \(3,\)"),
        ([], [], None, r"found shape \(0,\)"),
        ([1.0, float("nan")], [0, 0], None, "not finite"),
        ([1, 0], [0, 0], ["x"], "found 1 clusters, expected one for each of 2 problems"),
    ],
)
def test_bad_input_is_one_line(a, b, clusters, message: str):
    with pytest.raises(UserError, match=message):
        paired_bootstrap(np.array(a), np.array(b), clusters=clusters)
