"""Arrivals that wait for nobody have the rates, the spread and the lengths that they say."""

import itertools
import random
import statistics
from collections import Counter

import pytest

from jaxstack.engine.scheduling.arrivals import TRACES, gamma_arrivals, long_documents, trace
from jaxstack.runtime.errors import UserError


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gamma_arrivals_have_their_rate_and_spread(cv):
    times = list(gamma_arrivals(5.0, 4000.0, random.Random(0), cv=cv))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times == sorted(times) and times[-1] < 4000
    assert len(times) / 4000 == pytest.approx(5.0, rel=0.06)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.06)


def test_long_documents_are_long_shared_and_those_who_misbehave_ask_more():
    load = long_documents(until_s=40.0, clients=2, rate=1.0, misbehaving=1, document_tokens=800)
    arrivals = load.start()
    counts = Counter(a.client for a in arrivals)
    assert load.well_behaved == {"client-00", "client-01"} and counts["flood-00"] > 2 * counts["client-00"]
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    prefixes = Counter(a.prompt[:400] for a in arrivals if a.client == "flood-00")
    assert max(prefixes.values()) == 6
    assert 600 < statistics.fmean(len(a.prompt) for a in arrivals) < 1100
    twice = long_documents(until_s=40.0, clients=2, floods=1.0, longer=2.0, document_tokens=800)
    lengths = {c: statistics.fmean(len(a.prompt) for a in twice.start() if a.client == c) for c in counts}
    assert lengths["flood-00"] > 1.5 * lengths["client-00"]


def test_traces_have_their_rates_and_silences():
    arrivals = trace("overload", until_s=120.0).start()
    assert Counter(a.client for a in arrivals) == {"client-1": 180, "client-2": 360}
    silent = [a.at_s for a in trace("on_off", until_s=240.0).start() if a.client == "client-1"]
    assert all(at_s % 120 < 60 for at_s in silent) and len(silent) == 60
    shift = [a.at_s for a in trace("shift", until_s=300.0, speed=2.0).start() if a.client == "client-2"]
    assert [sum(lo <= t < lo + 100 for t in shift) for lo in (0, 100, 200)] == [100, 300, 600]
    assert len({a.client for a in trace("arena", until_s=300.0, speed=0.2).start()}) > 15
    for name in TRACES:
        first, second = (trace(name, 3, until_s=30.0).start() for _ in range(2))
        assert [(a.at_s, a.prompt) for a in first] == [(a.at_s, a.prompt) for a in second] and first
    with pytest.raises(UserError, match="found 'none', expected one of arena"):
        trace("none")
    with pytest.raises(UserError, match="rate 0"):
        list(gamma_arrivals(0, 1, random.Random(0)))
