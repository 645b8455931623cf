"""The rules against brute force, closed forms, scipy, and sequences of labels that somebody picks to break them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.budget import ErrorBudget
from jaxstack.serving.semantic_cache.paper_rules import exploration, fit_logistic, wilson_lower, wilson_threshold
from jaxstack.serving.semantic_cache.policies import (
    POLICIES,
    BayesThreshold,
    GPTCacheRule,
    SigmoidOnly,
    SigmoidProbability,
    VCacheRule,
    make_policy,
)
from jaxstack.serving.semantic_cache.policy import NO_ENTRY
from jaxstack.serving.semantic_cache.posterior import PosteriorTable, ThresholdGrid


def one(policy, entry, similarity, u=0.5):
    """The decision on one request with one candidate."""
    decided = policy.decide(np.array([[entry]]), np.array([[similarity]]), np.array([u]))
    return float(decided.tau[0]), bool(decided.hit[0]), float(decided.alpha[0])


def teach(policy, entry, labels):
    for s, c in labels:
        policy.label(entry, s, c, 1.0)


# -------------------------------------------------------------------------------------------------------- the paper's


@pytest.mark.parametrize("seed", range(8))
def test_the_curve_is_the_one_that_scipy_finds(seed):
    rng = np.random.default_rng(seed)
    s = np.round(rng.uniform(0.2, 1, 60), 3)
    c = (rng.random(60) < expit(12 * (s - rng.uniform(0.5, 0.8)))).astype(float)
    s, c = np.append(s, [0.9, 0.4]), np.append(c, [0.0, 1.0])  # not separable, whatever was drawn

    def loss(b):
        z = b[0] + b[1] * s
        return float(np.logaddexp(0, z).sum() - (c * z).sum())

    b = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x
    found = fit_logistic(s, c)
    assert abs(found.t - np.clip(-b[0] / b[1], 0, 1)) < 1e-3
    assert abs(found.gamma - b[1]) < 2e-3 * abs(b[1])
    # The delta method, written out: var(-b0/b1).
    p = expit(b[0] + b[1] * s)
    w = p * (1 - p)
    information = np.array([[w.sum(), (w * s).sum()], [(w * s).sum(), (w * s * s).sum()]])
    covariance = np.linalg.inv(information)
    g = np.array([-1 / b[1], b[0] / b[1] ** 2])
    assert np.isclose(found.variance, g @ covariance @ g, rtol=1e-2)


def test_separated_labels_have_the_papers_variance():
    labels = [(0.0, 0), (1.0, 1), (0.3, 0), (0.4, 0), (0.8, 1), (0.9, 1)]
    found = fit_logistic(*np.array(labels, dtype=float).T)
    assert found.variance == 0.0354
    assert 0.4 < found.t < 0.8
    assert found.gamma > 30
    more = labels + [(0.2, 0)] * 4
    assert fit_logistic(*np.array(more, dtype=float).T).variance == 0.0194


def test_tau_is_the_least_over_epsilon():
    rng = np.random.default_rng(0)
    fits = np.stack([rng.uniform(0.3, 0.9, 20), rng.uniform(1, 90, 20), rng.uniform(1e-4, 0.05, 20)], axis=1)
    s, delta = rng.uniform(0, 1, 20), rng.uniform(0.005, 0.1, 20)
    found = exploration(fits, s, delta)
    for (t, gamma, variance), similarity, bound, tau in zip(fits, s, delta, found):
        taus = []
        for eps in np.linspace(1e-6, 1 - 1e-6, 50):
            upper = min(1.0, max(0.0, t + norm.ppf(1 - eps) * math.sqrt(variance)))
            alpha = (1 - eps) / (1 + math.exp(-gamma * (similarity - upper)))
            taus.append(1 - bound / (1 - alpha))
        assert np.isclose(tau, min(taus), rtol=1e-9)


def test_the_papers_rule_asks_until_it_has_four_labels():
    policy = VCacheRule(0.05)
    for n in range(4):
        assert one(policy, 7, 1.0)[0] == 1.0, n
        policy.label(7, 0.95, True, 1.0)
    tau, hit, _ = one(policy, 7, 1.0)
    assert tau < 1
    assert hit == (tau < 0.5)
    assert one(policy, 8, 1.0)[0] == 1.0  # another entry knows nothing of it
    policy.forget(7)
    assert one(policy, 7, 1.0)[0] == 1.0


def test_if_the_model_holds_the_papers_bound_does():
    """Labels drawn from a logistic curve, similarities i.i.d.: errors per request stay below delta."""
    delta, rng = 0.05, np.random.default_rng(3)
    wrong = requests = 0
    for entry in range(30):
        policy, t, gamma = VCacheRule(delta), rng.uniform(0.5, 0.8), rng.uniform(20, 60)
        for _ in range(60):
            s = float(rng.uniform(0.3, 1))
            right = bool(rng.random() < expit(gamma * (round(s, 3) - t)))
            _, hit, _ = one(policy, entry, s, u=float(rng.random()))
            requests += 1
            if hit:
                wrong += not right
            else:
                policy.label(entry, s, right, 1.0)
    assert wrong / requests <= delta


def test_variants_of_the_papers_rule():
    labels = [(0.5, False), (0.55, False), (0.9, True), (0.95, True)]
    only, probability = SigmoidOnly(0.02), SigmoidProbability(0.02)
    together = make_policy("global", delta=0.02)
    for policy in (only, probability, together):
        teach(policy, 1, labels)
    pairs = [(0.0, 0), (1.0, 1), *labels]
    fit = fit_logistic(*np.array(pairs, dtype=float).T)
    for s in np.linspace(0, 1, 41):
        s = round(float(s), 3)
        assert one(only, 1, s)[1] == (s >= fit.t)
        assert one(probability, 1, s)[1] == (expit(fit.gamma * (s - fit.t)) >= 0.98)
        assert one(together, 99, s)[0] == one(together, 1, s)[0]


def test_wilson_threshold_is_the_smallest_that_is_sure_enough():
    z = norm.ppf(0.95)
    assert np.isclose(wilson_lower(np.array(0.9), 100, np.array(z)), 0.8387, atol=2e-3)  # textbook value, one-sided
    rng = np.random.default_rng(1)
    pairs = tuple((float(s), 0.0) for s in rng.uniform(0, 0.5, 100)) + ((1.0, 1.0),) * 300
    found, delta = wilson_threshold(pairs, 0.05), 0.05 * 400 / 100
    ok = []
    for theta in np.linspace(0, 1, 100):
        share, n = np.mean([s <= theta for s, c in pairs if not c]), 100
        for eps in np.linspace(1e-6, 1 - 1e-6, 50):
            q = norm.ppf(1 - eps)
            low = (share + q * q / (2 * n) - q * math.sqrt(share * (1 - share) / n + q * q / (4 * n * n))) / (
                1 + q * q / n
            )
            if eps < delta and low > 1 - (delta - eps) / (1 - eps):
                ok.append(theta)
                break
    assert found == min(ok)
    assert wilson_threshold(((0.0, 0.0), (1.0, 1.0)), 0.02) == math.inf


def test_gptcache_is_a_cosine_of_0_6_and_a_coin():
    assert one(GPTCacheRule(), 1, 0.601)[1]
    assert not one(GPTCacheRule(), 1, 0.599)[1]
    coin = GPTCacheRule(temperature=1.0)
    passed_over = 1 / (1 + math.e)
    assert not one(coin, 1, 0.9, u=passed_over - 1e-6)[1]
    assert one(coin, 1, 0.9, u=passed_over + 1e-6)[1]
    assert not one(GPTCacheRule(temperature=2.0), 1, 1.0, u=1 - 1e-12)[1]


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_answered_without_a_candidate(name):
    policy = make_policy(name, threshold=0.0)
    empty = policy.decide(np.empty((2, 0), dtype=int), np.empty((2, 0)), np.array([0.99, 0.99]))
    none = policy.decide(np.full((2, 4), NO_ENTRY), np.zeros((2, 4)), np.array([0.99, 0.99]))
    for decided in (empty, none):
        assert not decided.hit.any()
        assert (decided.column == -1).all()
    assert policy.stopped is None


def test_bad_settings_are_refused_in_one_line():
    for make in (
        lambda: make_policy("best"),
        lambda: make_policy("bayes", delta=0.0),
        lambda: make_policy("vcache", delta=0.6),
        lambda: make_policy("bayes", tau_min=1.0),
        lambda: make_policy("static", threshold=1.5),
    ):
        with pytest.raises(UserError, match="expected") as caught:
            make()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


# --------------------------------------------------------------------------------------------------------------- ours


def test_alpha_and_tau_are_what_the_whole_grid_says():
    grid, delta = ThresholdGrid(), 0.02
    policy = BayesThreshold(delta, controller=False)
    rng = np.random.default_rng(5)
    seen = {e: [(round(float(s), 3), bool(rng.random() < s)) for s in rng.uniform(0, 1, e)] for e in range(12)}
    for entry, labels in seen.items():
        teach(policy, entry, labels)
    policy.table.learn_prior()
    for entry, labels in seen.items():
        for s in (0.0, 0.37, 0.9, 1.0):
            total = right = 0.0
            for i in range(grid.thresholds):
                for j in range(grid.slopes):
                    t = 1.2 * i / (grid.thresholds - 1)
                    gamma = 3 * (200 / 3) ** (j / (grid.slopes - 1))
                    weight = float(policy.table.prior[i * grid.slopes + j])

                    def p(at, t=t, gamma=gamma):
                        return 0.0025 + 0.995 / (1 + math.exp(-gamma * (at - t)))

                    for at, correct in labels:
                        weight *= p(at) if correct else 1 - p(at)
                    total += weight
                    right += weight * p(s)
            tau, _, alpha = one(policy, entry, s)
            assert np.isclose(alpha, right / total, rtol=1e-9)
            assert np.isclose(tau, max(0.05, 1 - delta / (1 - right / total)), rtol=1e-9)


def test_the_prior_is_what_em_finds():
    table, rng = PosteriorTable(), np.random.default_rng(2)
    labels = [(int(e), float(rng.uniform()), bool(rng.random() < 0.6)) for e in rng.integers(0, 40, 200)]
    for label in labels:
        table.add(*label)
    log = np.zeros((40, table.grid.size))
    for entry, s, c in labels:
        p = table.grid.right(np.array(round(s, 3)))
        log[entry] += np.log(p if c else 1 - p)
    pi = np.full(table.grid.size, 1 / table.grid.size)
    log = log[sorted({entry for entry, _, _ in labels})]
    for _ in range(8):
        w = np.exp(log + np.log(pi) - (log + np.log(pi)).max(axis=1, keepdims=True))
        count = (w / w.sum(axis=1, keepdims=True)).sum(axis=0) + 2 / table.grid.size
        pi = count / count.sum()
    table.learn_prior()
    assert np.allclose(table.prior, pi, rtol=1e-7)


def test_the_prior_is_learned_after_the_labels_that_it_should_be():
    table, learned = PosteriorTable(), []
    for n in range(1, 800):
        table.add(n % 7, 0.5, True)
        if table.due:
            table.learn_prior()
            learned.append(n)
    assert learned == [25, 50, 100, 150, 350, 550, 750]


def test_the_candidate_with_the_best_record_among_the_near_answers():
    policy = BayesThreshold(0.1, controller=False)
    teach(policy, 1, [(0.9, False)] * 8)
    teach(policy, 2, [(0.9, True)] * 8)
    teach(policy, 3, [(0.9, True)] * 50)
    near = np.array([[0.93, 0.90, 0.80]])
    decided = policy.decide(np.array([[1, 2, 3]]), near, np.array([0.9]))
    assert decided.column[0] == 1  # 3 has the better record, but is not among the near
    alone = BayesThreshold(0.1, k=1, controller=False)
    assert alone.decide(np.array([[1, 2, 3]]), near, np.array([0.9])).column[0] == 0


def test_a_batch_is_decided_as_its_requests_one_by_one():
    rng = np.random.default_rng(4)
    for name in POLICIES:
        both = [make_policy(name, delta=0.1) for _ in range(2)]
        for entry in range(6):
            labels = [(float(s), bool(s > 0.5)) for s in rng.uniform(0, 1, 9)]
            for policy in both:
                teach(policy, entry, labels)
        entries = np.stack([rng.permutation(6)[:4] for _ in range(40)])
        near = -np.sort(-rng.uniform(0.2, 1, (40, 4)), axis=1)
        u, lower = rng.random(40), rng.uniform(0.05, 0.2, 40)
        whole = both[0].decide(entries, near, u, lower)
        for i in range(40):
            single = both[1].decide(entries[i : i + 1], near[i : i + 1], u[i : i + 1], lower[i : i + 1])
            for field in ("column", "alpha", "tau", "hit"):
                expected = getattr(whole, field)[i]
                assert np.array_equal(getattr(single, field)[0], expected, equal_nan=field == "alpha"), (name, field)


# ------------------------------------------------------------------------------------------------------------- budget


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    delta=st.floats(0.002, 0.5),
    tau_min=st.floats(0.02, 0.5),
    eta=st.floats(0.0005, 0.05),
    delay=st.integers(0, 80),
    greed=st.floats(0, 1),
)
def test_no_sequence_of_labels_breaks_the_bound(seed, delta, tau_min, eta, delay, greed):
    """An adversary sees tau and chooses each label, late if it likes; mean(e) stays below the closed bound."""
    budget, rng, waiting, total = ErrorBudget(delta, tau_min, eta), np.random.default_rng(seed), [], 0.0
    for n in range(1, 400):
        effective = budget.delta_eff
        # The policy's belief is the adversary's to choose, too.
        tau = max(tau_min, 1 - effective / rng.choice([1e-9, 0.1, 1.0])) if effective else 1.0
        if rng.random() > tau:
            budget.answered()
        else:
            budget.explored(tau)
            if tau < 1:
                waiting.append((n + rng.integers(0, delay + 1), tau))
        for due in [w for w in waiting if w[0] <= n]:
            waiting.remove(due)
            wrong = bool(rng.random() < greed or due[1] <= tau_min)
            budget.labelled(due[1], not wrong)
            total += (1 - due[1]) / due[1] * wrong
        assert np.isclose(budget.estimate().error * n, total)
        most = (1 - tau_min) / tau_min
        # The closed form, one step of what was outstanding when nothing more was allowed included.
        outstanding = 1 + budget.max_pending if delay else 1
        assert total / n <= delta + (delta * math.log(50) / eta + most * outstanding) / n + 1e-9
        assert total / n <= budget.bound + 1e-9


def test_the_estimate_is_unbiased():
    """Exploring with known tau estimates what answering would have cost, within 3 standard errors."""
    rng, errors, truth = np.random.default_rng(0), [], []
    for _ in range(2000):
        budget, wrong_hits = ErrorBudget(0.5, 0.05, eta=1e-9), 0.0
        for _ in range(40):
            tau, right = float(rng.uniform(0.05, 0.9)), bool(rng.random() < 0.7)
            wrong_hits += (1 - tau) * (not right)  # the chance, so that only the estimate's own noise is left
            if rng.random() > tau:
                budget.answered()
            else:
                budget.explored(tau)
                budget.labelled(tau, right)
        errors.append(budget.estimate().error)
        truth.append(wrong_hits / 40)
    difference = np.array(errors) - np.array(truth)
    assert abs(difference.mean()) < 3 * difference.std() / math.sqrt(len(difference))


def test_labels_that_do_not_come_stop_it():
    budget = ErrorBudget(0.05, 0.05, max_pending=8)
    for _ in range(8):
        assert budget.stopped is None
        budget.explored(0.5)
    assert budget.stopped == "pending"
    for _ in range(8):
        budget.labelled(0.5, True)
    assert budget.stopped is None
    for n in range(40):
        budget.explored(0.5)
        budget.missing(0.5) if n % 2 else budget.labelled(0.5, True)
    assert budget.stopped == "labels"
    assert budget.delta_eff == 0
    for _ in range(200):  # explored for certain, with labels
        budget.explored(1.0)
        budget.labelled(1.0, True)
    assert budget.stopped is None


def test_errors_stop_it_until_they_have_been_paid_for():
    policy = BayesThreshold(0.02)
    teach(policy, 1, [(0.9, True)] * 200)
    assert one(policy, 1, 0.95, u=0.9)[1]
    policy.budget.pending += 3
    for _ in range(3):
        policy.label(1, 0.95, False, 0.05)
    assert policy.stopped == "budget"
    needed = 0
    while policy.stopped:
        tau, hit, _ = one(policy, 1, 0.95, u=0.9)
        assert (tau, hit) == (1.0, False)
        policy.label(1, 0.95, True, tau)
        needed += 1
    estimate = policy.budget.estimate()
    assert estimate.error <= policy.budget.bound
    assert needed == pytest.approx((3 * (0.95 / 0.05 / (0.9 * 0.02) - 1) * 0.002 - math.log(50)) / 0.002, abs=2)


# ------------------------------------------------------------------------------------------------ streams that hurt


def stream(policy, similarity, right, n, rng):
    """Replays n requests to one entry; returns the share answered from it, and wrongly so."""
    hits = wrong = 0
    for i in range(n):
        s, correct = similarity(i), bool(right(i))
        tau, hit, _ = one(policy, 1, s, u=float(rng.random()))
        if hit:
            hits += 1
            wrong += not correct
        else:
            policy.label(1, s, correct, tau)
    return hits / n, wrong / n


@pytest.mark.parametrize("p", [0.5, 0.7, 0.9])
def test_an_entry_that_is_right_by_chance_stays_within_delta(p):
    """The paper's rule does not hold its bound here: whether the answer is right does not follow similarity."""
    delta, n = 0.02, 1500
    shares = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        policy = BayesThreshold(delta)
        shares.append(stream(policy, lambda i: 0.95, lambda i, rng=rng: rng.random() < p, n, rng)[1])
        assert policy.budget.estimate().error <= policy.budget.bound
    assert np.mean(shares) <= delta + 2 * np.std(shares)


def test_drift_is_noticed_and_the_bound_holds_or_it_stops():
    """Right for a long time, then wrong for ever: without the controller it would go on answering for long."""
    delta, n = 0.02, 4000
    rng = np.random.default_rng(1)
    policy = BayesThreshold(delta)
    before = stream(policy, lambda i: 0.97, lambda i: True, n // 2, rng)
    after = stream(policy, lambda i: 0.97, lambda i: False, n // 2, rng)
    assert before[0] > 0.8
    assert before[1] == 0
    wrong = (before[1] + after[1]) / 2
    assert wrong <= policy.budget.bound
    late = stream(policy, lambda i: 0.97, lambda i: False, 1000, rng)
    assert late[1] <= 2 * delta


def test_near_duplicates_with_opposite_answers_are_not_answered_for_each_other():
    """Two questions a hair apart: whichever entry is nearest is right half of the time."""
    rng = np.random.default_rng(2)
    policy = BayesThreshold(0.02)
    hits, wrong = stream(policy, lambda i: 0.999, lambda i: i % 2, 3000, rng)
    assert wrong <= 0.02 + 3 * math.sqrt(0.02 / 3000)
    assert hits <= 0.1
