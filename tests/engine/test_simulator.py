"""The simulator decides what the engine decides; its workloads are what they say; its figures add up."""

import contextlib
import dataclasses
import random
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from jaxstack.engine import Engine, EngineConfig
from jaxstack.engine.live import EngineServer, step_shapes
from jaxstack.engine.observer import Silent
from jaxstack.engine.scheduling import policy_named
from jaxstack.engine.scheduling.driving import Arrival, OpenLoop, Together, drive
from jaxstack.engine.scheduling.measuring import Meter, jain, percentile
from jaxstack.engine.scheduling.programs import (
    ChatShape,
    JudgeShape,
    ProgramClient,
    Programs,
    TreeShape,
    trees,
)
from jaxstack.engine.scheduling.simulator import SimulatedReplica, UnfairSchedule
from jaxstack.engine.scheduling.step_cost import StepCostModel, StepLog, StepSample, StepShapes
from jaxstack.engine.scheduling.trace import TraceRecorder, read_trace
from jaxstack.engine.scheduling.workloads import DocumentClient, Documents, named
from jaxstack.models import DecoderConfig
from jaxstack.runtime.errors import UserError
from jaxstack.training.initialize import fresh_decoder

COSTS = StepCostModel(0.002, 25e-6)
SIZES = {"num_pages": 48, "page_size": 8, "max_sequences": 4, "max_batch_tokens": 48}
MODEL = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)


class Decisions(Silent):
    """Every row of every step."""

    def __init__(self):
        self.steps, self.entered = [], []

    def on_enter(self, request, place):
        self.entered.append((request.order, place))

    def on_step(self, plan, rows, launched_s, settled_s):
        self.steps.append([(row.sequence.request.order, row.start, row.count) for row in plan.rows])


@pytest.fixture(scope="module")
def engine():
    return warm_engine()


def warm_engine() -> Engine:
    engine = Engine(fresh_decoder(MODEL), None, EngineConfig(**SIZES, dtype="float32"))
    engine.warm_up(progress=False)
    return engine


def small_documents(seed: int = 0, **options) -> Documents:
    clients = [DocumentClient(f"client-{i}", 64, backlog=3) for i in range(3)]
    clients.append(DocumentClient("flood", 32, 1, None, 12, well_behaved=False))
    return Documents(clients, question=(2, 9), output=(2, 9), vocab=97, seed=seed, **options)


def small_programs(seed: int = 0) -> Programs:
    return Programs(
        [
            ProgramClient("tree", TreeShape(2, 3, 24, (4, 9))),
            ProgramClient("judge", JudgeShape(3, 40, 5, 4, (4, 9))),
            ProgramClient("chat", ChatShape((2, 3), (4, 12), (4, 12)), 2),
        ],
        vocab=97,
        seed=seed,
    )


def replica(policy: str = "dlpm", *, certify: bool = True, **sizes) -> SimulatedReplica:
    options = {"quantum": 64} if policy == "dlpm" else {}
    return SimulatedReplica.of(policy_named(policy, **options), COSTS, certify=certify, **{**SIZES, **sizes})


def run(server, workload, *, until_s=float("inf"), requests=10**9):
    """Drives until so many requests are over; returns the outcomes."""
    outcomes = []

    class Enough(Exception):
        pass

    def done(outcome):
        outcomes.append(outcome)
        if len(outcomes) >= requests:
            raise Enough

    with contextlib.suppress(Enough):
        drive(server, workload, until_s=until_s, on_outcome=done)
    return outcomes


def test_simulator_and_policies_need_no_jax():
    modules = "simulator, workloads, arrivals, measuring, trace, dlpm"
    code = f"from jaxstack.engine.scheduling import {modules}; import sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=600)


# The same decisions.


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "vtc", "dlpm"])
def test_simulator_decides_as_the_engine_does(engine, policy):
    engine.use_policy(policy_named(policy, **({"quantum": 64} if policy == "dlpm" else {})))
    live, simulated = Decisions(), Decisions()
    server = EngineServer(engine)
    engine.observers.append(live)
    first = engine.runner.recompilations
    try:
        run(server, small_documents(), requests=60)
    finally:
        engine.observers.remove(live)
        server.close()
    other = replica(policy)
    other.observers.append(simulated)
    run(other, small_documents(), requests=60)
    base = live.entered[0]
    entered = [(order - base[0], place - base[1]) for order, place in live.entered]
    assert entered == simulated.entered
    length = min(len(live.steps), len(simulated.steps))
    assert length > 80
    steps = [[(order - base[0], start, count) for order, start, count in step] for step in live.steps]
    assert steps[:length] == simulated.steps[:length]
    assert any(start for step in steps for _, start, count in step if count > 1)  # cached prefixes were used
    assert engine.runner.recompilations == first


@pytest.mark.parametrize("load", [small_documents, small_programs])
def test_a_recorded_trace_repeats_the_engines_decisions(engine, tmp_path, load):
    """With answers that come back in later prompts, and another order of arrival than the simulator's own clock has."""
    engine.use_policy(policy_named("dlpm", quantum=64))
    live, simulated = Decisions(), Decisions()
    file = tmp_path / "trace.jsonl"
    server = EngineServer(engine)
    with TraceRecorder(file, engine.scheduler, step_shapes(engine)) as recorder:
        engine.observers.extend((live, recorder))
        run(server, load(), requests=50)
        seen = len(live.steps)
        server.close()
        for observer in (live, recorder):
            engine.observers.remove(observer)
    trace = read_trace(file)
    ended = sum(request.finish_reason == "length" for request in trace.requests)
    assert ended >= 50 and len(trace.requests) == recorder.requests
    assert trace.requests[0].enters_at == 0 and trace.shapes == step_shapes(engine) and len(trace.steps) > 20
    assert "prompt" not in file.read_text().replace("prompt_tokens", "")
    sizes = {name: getattr(trace, name) for name in SIZES}
    assert sizes == SIZES
    other = SimulatedReplica.of(policy_named("dlpm", quantum=64), COSTS, **sizes)
    other.observers.append(simulated)
    run(other, trace.workload(by_place=True), requests=ended)
    first = live.entered[0][0]
    steps = [[(order - first, start, count) for order, start, count in step] for step in live.steps]
    assert seen > 60
    assert simulated.steps[: seen - 1] == steps[: seen - 1]


def test_replay_by_time_under_every_policy(engine, tmp_path):
    """What if: the recorded requests at their own times, elsewhere; all of them end, in any order of policies."""
    file = tmp_path / "trace.jsonl"
    engine.use_policy(policy_named("fcfs"))
    server = EngineServer(engine)
    with TraceRecorder(file, engine.scheduler) as recorder:
        engine.observers.append(recorder)
        run(server, small_documents(1), requests=20)
        server.close()
        engine.observers.remove(recorder)
    trace = read_trace(file)
    for policy in ("fcfs", "lpm", "vtc", "dlpm"):
        outcomes = run(replica(policy), trace.workload())
        assert len(outcomes) == len(trace.requests)
        assert {o.finish_reason for o in outcomes} <= {"length", "abort"}
        for outcome in outcomes:
            assert outcome.finished_s >= outcome.arrival_s == pytest.approx(outcome.arrival.at_s)


def test_a_broken_trace_is_named_by_line(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text("hello\n")
    with pytest.raises(UserError, match=r"line 1: found 'hello', expected the head of a trace"):
        read_trace(file)
    server = replica("fcfs")
    with TraceRecorder(file, server.scheduler) as recorder:
        server.observers.append(recorder)
        run(server, small_documents(), requests=12)
    whole = read_trace(file)
    text = file.read_text()
    file.write_text(text + text.splitlines()[-1][:30])  # a line that was cut off as its writer died
    assert read_trace(file) == whole
    lines = text.splitlines()
    file.write_text("\n".join([lines[0], lines[-1].replace('"pages": [', '"pages": [7, '), *lines[1:]]))
    with pytest.raises(UserError, match=r"line 2: .* pages, expected"):
        read_trace(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "none")


# The clock and the costs.


def test_time_is_the_sum_of_the_steps_when_nothing_waits_for_anything():
    """One request alone, by hand: a prefill in two chunks, then a decode step for each further token."""
    server = replica("fcfs")
    (outcome,) = run(server, OpenLoop([Arrival("a", tuple(range(60)), 5, at_s=1.0)]))
    chunks = COSTS.seconds(48) + COSTS.seconds(12)
    assert outcome.first_token_s == pytest.approx(1.0 + chunks)
    assert outcome.finished_s == pytest.approx(1.0 + chunks + 4 * COSTS.seconds(1))
    assert outcome.scheduled_s == 1.0 and outcome.arrival_s == 1.0 and outcome.cached_tokens == 0


def test_overlap_and_one_after_the_other_take_the_same_time_and_tokens():
    both = []
    for overlap in (True, False):
        server = SimulatedReplica.of(policy_named("fcfs"), COSTS, overlap=overlap, **SIZES)
        outcomes = run(server, OpenLoop([Arrival("a", tuple(range(20)), 6) for _ in range(3)]))
        both.append([(o.output_tokens, o.finish_reason) for o in outcomes])
        server.scheduler.check_accounting()
    assert both[0] == both[1] == [(6, "length")] * 3


def test_a_client_that_gives_up_is_told_of_and_frees_its_pages():
    server = replica("fcfs")
    loop = [Arrival("a", tuple(range(40)), 50, leaves_after_s=0.02), Arrival("b", tuple(range(50, 60)), 4)]
    outcomes = {o.client: o for o in run(server, OpenLoop(loop))}
    assert outcomes["a"].finish_reason == "abort" and outcomes["b"].finish_reason == "length"
    assert 0 < outcomes["a"].output_tokens < 50 and outcomes["a"].finished_s == pytest.approx(0.02, abs=0.01)
    assert server.unfinished == 0 and server.scheduler.pool.private == 0


def test_a_request_that_could_never_run_is_refused():
    with pytest.raises(UserError, match=r"a request of 'a': found 380 tokens of prompt and 5 to come"):
        replica().submit(Arrival("a", (1,) * 380, 5))
    with pytest.raises(UserError, match="at least 1 of each"):
        replica().submit(Arrival("a", (1,), 0))


def test_fit_finds_the_costs_that_made_the_samples():
    draw = random.Random(0)
    shapes = StepShapes((1, 4, 8), (64, 128))
    true = StepCostModel(0.003, 40e-6, 2e-7, 5e-9, shapes)
    samples = []
    for _ in range(300):
        rows, context, pairs = draw.choice((1, 4, 8, 64, 128)), draw.randrange(4000), draw.randrange(60_000)
        samples.append(StepSample(rows, context, pairs, true.seconds(rows, context, pairs) * draw.uniform(0.98, 1.02)))
    found = StepCostModel.fit(samples, shapes)
    for name, tolerance in (("base_s", 0.03), ("token_s", 0.03), ("context_token_s", 0.05), ("pair_s", 0.2)):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=tolerance)
    error = found.error(samples)
    assert error.median < 0.02 and error.p90 < 0.03 and abs(error.total) < 0.005
    assert found.scaled(2).seconds(8, 100, 50) == pytest.approx(2 * found.seconds(8, 100, 50))
    # Something that slowed one step in twenty tenfold moves it little; nothing is ever negative.
    slowed = [dataclasses.replace(s, seconds=s.seconds * (10 if i % 20 == 0 else 1)) for i, s in enumerate(samples)]
    assert StepCostModel.fit(slowed).base_s == pytest.approx(true.base_s, rel=0.15)
    falling = [StepSample(rows, 0, 0, 0.01 - 1e-5 * rows) for rows in range(1, 100)]
    fitted = StepCostModel.fit(falling)
    assert fitted.token_s == 0 and fitted.base_s == pytest.approx(0.0095, rel=0.02)
    with pytest.raises(UserError, match="found 9 steps of 1 sizes"):
        StepCostModel.fit([StepSample(4, 1, 1, 0.1)] * 9)
    with pytest.raises(UserError, match="base_s: found -1"):
        StepCostModel(-1, 1)


def test_a_simulated_step_log_gives_back_the_costs():
    """Padding, context and pairs of real plans: what is fitted to the simulator's log is what it was given."""
    costs = StepCostModel(0.002, 25e-6, 1e-7, 1e-8, StepShapes((1, 4), (64,)))
    server = SimulatedReplica.of(policy_named("fcfs"), costs, **SIZES)
    log = StepLog()
    server.observers.append(log)
    run(server, small_documents(), requests=40)
    found = StepCostModel.fit(log.samples)
    assert found.error(log.samples).p90 < 1e-6
    assert {sample.rows for sample in log.samples} <= {1, 4, 64}


# Workloads.


def test_documents_keep_their_backlog_and_their_lengths():
    load = small_documents()
    started = load.start()
    assert Counter(a.client for a in started) == {"client-0": 3, "client-1": 3, "client-2": 3, "flood": 12}
    again = small_documents().start()
    assert [(a.client, a.prompt) for a in again] == [(a.client, a.prompt) for a in started]
    assert [a.client for a in started] != sorted(a.client for a in started)
    server = replica()
    outcomes = run(server, small_documents(), requests=150)
    assert server.unfinished + 1 == 21  # the one that ended last has had no successor yet
    prefixes = defaultdict(Counter)
    for o in outcomes:
        length = 32 if o.client == "flood" else 64
        assert length + 2 <= o.prompt_tokens <= length + 9 and 2 <= o.output_tokens <= 9
        prefixes[o.client][o.arrival.prompt[:length]] += 1
    assert len(prefixes["flood"]) == 1
    assert all(len(found) >= 2 and max(found.values()) <= 8 for c, found in prefixes.items() if c != "flood")


def test_trees_are_of_30_and_340_requests_and_wait_for_their_levels():
    assert [sum(b**level for level in range(1, 5)) for b in (2, 4)] == [30, 340]
    load = Programs([ProgramClient("a", TreeShape(2, 4, 16, (3, 5)))], vocab=97)
    server = replica("fcfs")
    outcomes = run(server, load, requests=60)
    assert [run.requests for run in load.finished] == [30]  # the second is told of after its last outcome
    for i, level in enumerate((2, 4, 8, 16)):
        begin = sum((2, 4, 8, 16)[:i])
        now, before = outcomes[begin : begin + level], outcomes[:begin]
        assert min(o.arrival_s for o in now) >= max((o.finished_s for o in before), default=0.0)
        assert all(o.prompt_tokens >= 16 + 3 * i for o in now)
    parents = {o.arrival.prompt + o.answer for o in outcomes[:2]}
    assert {o.arrival.prompt for o in outcomes[2:6]} == parents
    assert len(trees().start()) == 12 * 2 + 4 * 4
    assert len(trees(branching=2, question_tokens=1280).start()[0].prompt) in (128, 1280)


def test_a_judge_merges_what_it_was_told_and_a_chat_repeats_it():
    load = small_programs()
    outcomes = run(replica("fcfs"), load, requests=60)
    of = defaultdict(list)
    for o in outcomes:
        of[o.client].append(o)
    plan, *verdicts = of["judge"][:4]
    merge = of["judge"][4]
    assert all(v.arrival.prompt[-len(plan.answer) :] == plan.answer for v in verdicts)
    # Verdicts may end in any order; they are put together in the order in which they were asked.
    verdicts.sort(key=lambda o: o.arrival.tag[1])
    assert merge.arrival.prompt[49:] == sum((v.answer for v in verdicts), ())
    talks = [o for o in of["chat"] if any(o.arrival.prompt[: len(p.arrival.prompt)] == p.arrival.prompt and
             o.arrival.prompt[len(p.arrival.prompt) :][: len(p.answer)] == p.answer
             for p in of["chat"] if p is not o)]  # fmt: skip
    assert talks and load.finished


def test_workloads_together_and_unknown_names():
    together = Together(small_documents(), small_programs())
    outcomes = run(replica("fcfs"), together, requests=80)
    assert {"flood", "tree", "judge", "chat"} <= {o.client for o in outcomes}
    with pytest.raises(ValueError, match="two workloads"):
        list(Together(small_documents(), small_documents(1)).start())
    with pytest.raises(UserError, match="found 'nothing', expected one of chat, equal"):
        named("nothing")
    with pytest.raises(UserError, match="backlog of client 'a': found 0"):
        DocumentClient("a", backlog=0)


# Figures.


def test_jain_and_percentile():
    assert jain([3, 3, 3]) == pytest.approx(1) and jain([9, 0, 0]) == pytest.approx(1 / 3) and jain([0, 0]) == 1
    assert percentile([5, 1, 3, 2, 4], 0.5) == 3 and percentile([1, 2], 0.99) == 2 and percentile([], 0.5) is None


@pytest.mark.parametrize("pages", [48, 20])
def test_services_add_up_even_when_sequences_are_preempted(pages):
    """The meter's step by step account is that of the requests: uncached prompt tokens and twice the answers."""
    server = replica("fcfs", num_pages=pages)
    meter = Meter()
    server.observers.append(meter)
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(3, 97) for _ in range(24)) for _ in range(4)]
    arrivals = [
        Arrival(f"c{i % 3}", (*draw.choice(prompts), i + 100, 5), draw.randint(4, 60), at_s=draw.random())
        for i in range(40)
    ]
    outcomes = run(server, OpenLoop(arrivals))
    for outcome in outcomes:
        meter.on_outcome(outcome)
    assert (server.scheduler.counters.preemptions > 0) == (pages == 20)
    row = meter.row(0.0, server.now_s)
    span = server.now_s
    services = Counter()
    for o in outcomes:
        services[o.client] += o.prompt_tokens - o.cached_tokens + 2 * o.output_tokens
    assert row.actual_rate * span == pytest.approx(sum(services.values()))
    assert row.jain == pytest.approx(jain(services.values()))
    assert row.service_rate * span == pytest.approx(sum(o.prompt_tokens + 2 * o.output_tokens for o in outcomes))
    assert row.requests == 40 and row.hit_rate == pytest.approx(
        sum(o.cached_tokens for o in outcomes) / sum(o.prompt_tokens for o in outcomes)
    )
    _, over_time = meter.service_over_time()
    assert {client: values[-1] for client, values in over_time.items()} == services
    assert meter.latencies(0, span)["c0"].p50_s == percentile([o.latency_s for o in outcomes if o.client == "c0"], 0.5)


# Policies, by what the simulator says of them.


def test_locality_without_fairness_starves_and_dlpm_has_both():
    rows = {}
    for policy in ("lpm", "vtc", "dlpm"):
        options = {"quantum": 1024} if policy == "dlpm" else {}
        server = SimulatedReplica.of(policy_named(policy, **options), COSTS)
        meter = Meter(named("mixed").well_behaved)
        server.observers.append(meter)
        drive(server, named("mixed"), until_s=8.0, on_outcome=meter.on_outcome)
        certificate = server.scheduler.steward.certificate
        rows[policy] = meter.row(3.0, 8.0, gap=certificate.max_gap, bound=certificate.bound)
    assert rows["dlpm"].service_rate > 1.4 * rows["vtc"].service_rate
    assert rows["dlpm"].jain > 0.98 and rows["vtc"].jain > 0.98 and rows["lpm"].jain < 0.4
    assert rows["lpm"].served < 12 == rows["dlpm"].served
    for policy in ("vtc", "dlpm"):
        assert 0.1 < rows[policy].gap_over_bound <= 1
    assert rows["lpm"].gap_over_bound is None


def test_a_schedule_that_breaks_its_bound_is_caught():
    """FCFS under a promise that it does not keep."""
    policy = policy_named("fcfs")
    policy.bound = lambda longest_prompt, output_tokens: 200
    server = SimulatedReplica.of(policy, COSTS)
    with pytest.raises(UnfairSchedule, match=r"more than the bound 200"):
        drive(server, named("mixed"), until_s=20.0)
