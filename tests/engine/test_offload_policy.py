"""The hierarchical roofline and the search over policies: the authors' printed figures, and brute force."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.memory import hrm
from jaxstack.engine.memory.hrm import MODELS, predict
from jaxstack.engine.memory.offload_plan import Model, Policy, Workload
from jaxstack.engine.memory.policy_search import Limits, search
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.machine import GIB, PROFILES, HardwareProfile, Link, Processor

MIXTRAL = MODELS["mixtral_8x7b"]
# Machine, generated tokens, micro-batch and number of them as published, tokens/s by the artifact's formulas.
PUBLISHED = [
    ("l4", 32, 324, 14, 944.7),
    ("l4", 64, 228, 16, 771.0),
    ("l4", 128, 164, 16, 559.6),
    ("l4", 256, 132, 12, 344.9),
    ("t4", 32, 164, 19, 603.3),
    ("t4", 64, 164, 19, 593.7),
    ("t4", 128, 164, 14, 445.6),
    ("t4", 256, 100, 15, 296.1),
]


def resident(machine, model, workload, mu, n):
    """The largest share of the experts that the device has room for."""
    device, _ = hrm.memory_parts(
        machine, model, workload, micro_batch=mu, n_micro_batches=n, attention_on_device=False, ffn_on_device=True
    )
    bytes_ = hrm.total(device)
    return (hrm.device_limit(machine) - bytes_.fixed) / bytes_.weights


def test_the_printed_example_of_the_artifact():
    machine, workload = PROFILES["l4"], Workload(77, 32)
    share = resident(machine, MIXTRAL, workload, 324, 14)
    assert share == pytest.approx(0.0559, abs=5e-5)
    found = predict(machine, MIXTRAL, workload, Policy(324, 14, weight_resident=share), "paper")
    assert found.period_s == pytest.approx(0.1549, rel=3e-4)  # printed with four digits
    assert found.decode_tokens_per_s == pytest.approx(944.66, rel=1e-4)
    assert found.binding == "to_device" and found.fits


@pytest.mark.parametrize("machine, generated, mu, n, rate", PUBLISHED)
def test_the_published_policies_are_priced_as_by_the_artifact(machine, generated, mu, n, rate):
    workload = Workload(77, generated)
    share = resident(PROFILES[machine], MIXTRAL, workload, mu, n)
    found = predict(PROFILES[machine], MIXTRAL, workload, Policy(mu, n, weight_resident=share), "paper")
    assert found.decode_tokens_per_s == pytest.approx(rate, rel=1e-3)
    assert found.fits


@pytest.mark.parametrize(
    "machine, generated, mu, n, rate",
    [("l4", 32, 287, 16, 964.5), ("l4", 256, 112, 15, 367.4), ("t4", 32, 176, 19, 647.4), ("t4", 128, 135, 18, 474.3)],
)
def test_the_search_finds_better_policies_than_the_authors(machine, generated, mu, n, rate):
    limits = Limits(attention_on_device=(False,), ffn_on_device=(True,))
    found = search(
        PROFILES[machine], MIXTRAL, Workload(77, generated), objective="decode", terms="paper", limits=limits
    )
    assert (found.policy.micro_batch, found.policy.n_micro_batches) == (mu, n)
    assert found.prediction.decode_tokens_per_s == pytest.approx(rate, rel=1e-3)
    assert found.bound == pytest.approx(found.prediction.decode_tokens_per_s)
    assert found.status == "optimal" and found.seconds < 20


SMALL = Model("small", 6, 64, 96, 8, 2, 4, 2)
SMALL_MACHINE = HardwareProfile(
    "small",
    Processor(3e9, 2e8, 700_000),
    Processor(4e8, 6e7, 1_500_000),
    Link(2e7, 1.5e7),
)


@pytest.mark.parametrize("objective", ["decode", "end_to_end"])
@pytest.mark.parametrize("terms", ["paper", "full"])
@pytest.mark.parametrize("attention, ffn", list(itertools.product([False, True], [False, True])))
@pytest.mark.parametrize("kv_shares, split", [(None, True), ((0.0, 1.0), False)])
def test_no_policy_of_a_grid_beats_the_search(objective, terms, attention, ffn, kv_shares, split):
    """Every cut with all shares of a fine grid."""
    workload = Workload(9, 7)
    machine = SMALL_MACHINE
    limits = Limits(
        max_requests=24,
        attention_on_device=(attention,),
        ffn_on_device=(ffn,),
        kv_shares=kv_shares,
        split_experts=split,
    )
    found = search(machine, SMALL, workload, objective=objective, terms=terms, limits=limits)
    best = 0.0
    shares = np.linspace(0, 1, 101)
    kv_grid = (shares if kv_shares is None else kv_shares) if attention else [0.0]
    weights, kv = (grid.ravel() for grid in np.meshgrid(shares if ffn or split else [0.0], kv_grid))
    for mu in range(1, 25):
        for n in range(1, 24 // mu + 1):
            cut = {"micro_batch": mu, "n_micro_batches": n}
            placed = {"attention_on_device": attention, "ffn_on_device": ffn}
            device, host = (hrm.total(p) for p in hrm.memory_parts(machine, SMALL, workload, **cut, **placed))
            fits = (device.at(weights, kv) <= hrm.device_limit(machine)) & (
                host.at(weights, kv) <= hrm.host_limit(machine)
            )
            if not fits.any():
                continue
            share = {"weight_resident": weights[fits], "kv_resident": kv[fits]}
            seconds = hrm.layer_terms(machine, SMALL, workload, terms, **cut, **placed, **share)
            period = np.maximum.reduce(np.broadcast_arrays(*seconds.values()))
            if objective == "decode":
                rates = hrm.decode_rate(terms, SMALL, workload, mu * n, period)
            else:
                prefill = hrm.prefill_seconds(machine, SMALL, workload, **cut, **share)
                rates = hrm.end_to_end_rate(SMALL, workload, mu * n, period, prefill)
            best = max(best, float(rates.max()))
    assert best > 0 and found.status == "optimal"
    assert found.prediction.fits
    assert best <= found.bound * (1 + 1e-9)
    assert found.bound <= best * 1.06, "the grid is fine enough to come near"
    rate = getattr(found.prediction, f"{objective}_tokens_per_s")
    assert rate == pytest.approx(found.bound, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    device=st.integers(50_000, 1_500_000),
    host=st.integers(50_000, 2_000_000),
    link=st.floats(1e6, 1e9),
    prompt=st.integers(1, 40),
    generated=st.integers(2, 40),
)
def test_what_is_found_fits_and_what_is_not_found_is_explained(device, host, link, prompt, generated):
    machine = dataclasses.replace(
        SMALL_MACHINE.with_memory(device_bytes=device, host_bytes=host), link=Link(link, link)
    )
    workload = Workload(prompt, generated)
    found = search(machine, SMALL, workload, limits=Limits(max_requests=12))
    if found.status == "optimal":
        assert found.prediction.fits and found.policy.requests <= 12
        assert found.prediction.binding == found.binding_resource
        assert all(found.bound >= p.end_to_end_tokens_per_s * (1 - 1e-9) for _, p in found.alternatives)
    else:
        assert "one request needs" in found.reason and "too little" in found.reason
        assert found.policy is None
        shares = np.linspace(0, 1, 21)
        for attention, ffn, w, kv in itertools.product([False, True], [False, True], shares, shares):
            policy = Policy(1, 1, attention, ffn, float(w), float(kv) if attention else 0.0)
            assert not predict(machine, SMALL, workload, policy).fits


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 300), st.integers(1, 20), st.sampled_from(["paper", "full"]))
@settings(max_examples=60, deadline=None)
def test_more_resident_weights_are_never_slower_and_never_smaller(one, other, mu, n, terms):
    low, high = sorted([one, other])
    less, more = (
        predict(PROFILES["t4"], MIXTRAL, Workload(77, 64), Policy(mu, n, weight_resident=share), terms)
        for share in (low, high)
    )
    assert more.period_s <= less.period_s and more.prefill_s <= less.prefill_s
    assert more.device_bytes >= less.device_bytes and more.host_bytes <= less.host_bytes


def test_full_terms_of_the_example():
    """T4, 128 tokens, the published policy: milliseconds of each task."""
    workload = Workload(77, 128)
    share = resident(PROFILES["t4"], MIXTRAL, workload, 164, 14)
    policy = Policy(164, 14, weight_resident=share)
    times = hrm.policy_times(PROFILES["t4"], MIXTRAL, workload, policy)
    assert [round(1e3 * seconds, 2) for seconds in (times.before, times.attention, times.after)] == [0.16, 0.91, 8.87]
    assert [round(1e3 * t, 2) for t in (times.qkv_to_host, times.output_to_device)] == [0.12, 0.08]
    assert 1e3 * times.weights == pytest.approx(162.3, abs=0.05)
    on_device = hrm.policy_times(
        PROFILES["t4"], MIXTRAL, workload, dataclasses.replace(policy, attention_on_device=True)
    )
    assert 1e3 * on_device.load_kv == pytest.approx(5.5, abs=0.05)


# The roofline.


def test_turning_points_are_where_the_best_way_changes():
    machine = PROFILES["l4"]
    for intensity in (0.5, 4.0, 60.0, 5000.0):
        points = hrm.turning_points(machine, intensity)
        for host_intensity in np.geomspace(1e-2, 1e5, 300):
            link = machine.link.to_device_bytes_per_s * host_intensity
            stays = link < hrm.attainable_on_host(machine, host_intensity)
            assert stays == (host_intensity < points.stay_below)
            bound = hrm.attainable(machine, intensity, host_intensity) < hrm.attainable(machine, intensity)
            assert bound == (host_intensity < points.link_bound_below)
        balance = hrm.balance_point(machine, intensity)
        assert machine.device.bytes_per_s * intensity == pytest.approx(machine.link.to_device_bytes_per_s * balance)
    slow_host = dataclasses.replace(machine, host=Processor(1e12, 1 * GIB, 64 * GIB))
    assert hrm.turning_points(slow_host, 1.0).stay_below == 0


def test_attention_of_mixtral_stays_on_the_host_whatever_the_batch():
    points = hrm.turning_points(PROFILES["l4"], hrm.attention_intensity(MIXTRAL))
    assert (
        hrm.attention_intensity(MIXTRAL) == 4
    )  # four query heads share a head of KV; two FLOPs an element of two bytes
    assert hrm.attention_intensity(MIXTRAL) < points.stay_below
    assert hrm.ffn_intensity(MIXTRAL, 4536) > hrm.turning_points(PROFILES["l4"], 1e9).stay_below


def test_bad_values_are_named():
    with pytest.raises(UserError, match="policy: micro_batch: found 0"):
        Policy(0, 1)
    with pytest.raises(UserError, match=r"weight_resident: found 1\.2"):
        Policy(1, 1, weight_resident=1.2)
    with pytest.raises(UserError, match="experts_per_token: found 9"):
        Model("odd", 2, 8, 8, 2, 1, 8, 9)
    with pytest.raises(UserError, match="generated_tokens: found 1, expected at least 2"):
        predict(PROFILES["t4"], MIXTRAL, Workload(8, 1), Policy(1, 1), "paper")
    with pytest.raises(UserError, match="objective: found 'fast'"):
        search(PROFILES["t4"], MIXTRAL, Workload(8, 8), objective="fast")  # type: ignore[arg-type]


def test_a_search_says_which_memory_is_too_small():
    tiny = PROFILES["t4"].with_memory(device_bytes=2 * GIB)
    found = search(tiny, MIXTRAL, Workload(77, 32), limits=Limits(ffn_on_device=(True,)))
    assert found.status == "infeasible"
    assert "device memory: one request needs" in found.reason and "page buffers" in found.reason
    assert math.isfinite(found.seconds) and found.bound is None


def test_fewer_spare_pages_are_taken_where_they_pay():
    """A link so slow that the device waits anyway: the buffer is better spent on resident experts."""
    workload, machine = Workload(9, 7), dataclasses.replace(SMALL_MACHINE, link=Link(2e6, 2e6))
    options = {"max_requests": 24, "attention_on_device": (False,), "ffn_on_device": (True,)}
    whole = search(machine, SMALL, workload, objective="decode", limits=Limits(**options))
    shares = search(machine, SMALL, workload, objective="decode", limits=Limits(**options, buffer_shares=(1.0, 0.5)))
    assert whole.status == "optimal" and shares.status in ("optimal", "feasible")
    assert shares.policy.buffer_share < 1 and shares.policy.weight_resident > whole.policy.weight_resident
    assert whole.bound < shares.prediction.decode_tokens_per_s <= shares.bound * (1 + 1e-9)
    assert shares.prediction.fits
