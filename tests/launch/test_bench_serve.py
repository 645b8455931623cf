"""bench_serve without a peer: workloads, the pipe to the other environment, turns, statistics, agreement."""

import ast
import dataclasses
import json
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import programs
import psutil
import pytest
from flax import nnx

from jaxstack.engine.request import RequestTiming
from jaxstack.models.attention import dense_attention
from jaxstack.models.checkpoint import save_decoder
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.runtime.errors import UserError
from launch.peers import PeerProcess, find_interpreter
from launch.serve_benchmark import matmul_limit, report
from launch.serve_benchmark.agreement import NEAR_TIE, Agreement, PlainForward, compare
from launch.serve_benchmark.contest import Contest, PeerMode, Progress, Run, fastest
from launch.serve_benchmark.machine import LoadMeter, describe
from launch.serve_benchmark.matmul_limit import MatmulTimes
from launch.serve_benchmark.ours import Measured, number_tokenizer
from launch.serve_benchmark.shapes import model_config, scale_of
from launch.serve_benchmark.workload import Workload

# A peer without a model: request i is answered with the token i, `slow` pretends to take longer, and stdout is noisy.
FAKE_PEER = """
    import json, sys, time
    for line in sys.stdin:
        request = json.loads(line)
        do = request["do"]
        print("loading weights: 100%", flush=True)
        if do == "die":
            print("No module named 'transformers'", file=sys.stderr)
            raise ModuleNotFoundError("No module named 'transformers'")
        if do == "sleep":
            time.sleep(60)
        if do == "refuse":
            print(json.dumps({"error": "ValueError: no such mode"}), flush=True)
            continue
        tokens = [[i] * n for i, n in enumerate(request.get("max_tokens", []))]
        wall = request.get("slow", 1.0)
        print(json.dumps({"wall_s": wall, "cpu_s": 2 * wall, "tokens": tokens}), flush=True)
"""


@pytest.fixture
def fake_peer(tmp_path):
    program = tmp_path / "fake_peer.py"
    program.write_text(textwrap.dedent(FAKE_PEER))
    opened = []

    def open_peer(policy: str = "PASSIVE") -> PeerProcess:
        log = tmp_path / f"{policy}.log"
        opened.append(PeerProcess([sys.executable, program], log_file=log, environment={"POLICY": policy}, name="fake"))
        return opened[-1]

    yield open_peer
    for peer in opened:
        peer.close()
        assert not peer.process.is_running()


class TestWorkload:
    def test_the_same_seed_gives_the_same_requests(self):
        assert Workload(seed=3).draw(5) == Workload(seed=3).draw(5)
        assert Workload(seed=3).draw(5) != Workload(seed=4).draw(5)

    def test_variants_share_lengths_and_no_prompt(self):
        workload = Workload(requests=16, vocab_size=1000)
        one, other = workload.draw(0), workload.draw(1)
        assert list(map(len, one.prompts)) == list(map(len, other.prompts))
        assert one.max_tokens == other.max_tokens
        assert not {tuple(p[:8]) for p in one.prompts} & {tuple(p[:8]) for p in other.prompts}

    def test_lengths_fill_their_bounds(self):
        drawn = Workload(requests=2000, prompt_tokens=(2, 5), output_tokens=(1, 3), vocab_size=7).draw(0)
        assert {len(p) for p in drawn.prompts} == {2, 3, 4, 5}
        assert set(drawn.max_tokens) == {1, 2, 3}
        assert {t for p in drawn.prompts for t in p} == set(range(7))

    def test_shared_prefix(self):
        workload = Workload(requests=4, prompt_tokens=(512, 512), shared_prefix=0.75)
        drawn = workload.draw(0)
        assert workload.shared_tokens == 384
        assert {len(p) for p in drawn.prompts} == {512}
        assert len({tuple(p[:384]) for p in drawn.prompts}) == 1
        assert len({p[384] for p in drawn.prompts}) == 4
        assert drawn.prompts[0][:384] != workload.draw(1).prompts[0][:384]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("requests", 0),
            ("prompt_tokens", (5, 4)),
            ("output_tokens", (0, 4)),
            ("shared_prefix", 1.0),
            ("vocab_size", 1),
        ],
    )
    def test_bad_values_are_named(self, field, value):
        with pytest.raises(UserError, match=field):
            Workload(**{field: value})


class TestPeerProcess:
    def test_answers_come_through_the_noise(self, fake_peer):
        assert fake_peer().ask("generate", max_tokens=[2, 1])["tokens"] == [[0, 0], [1]]

    def test_an_error_is_one_line_and_the_next_request_works(self, fake_peer):
        peer = fake_peer()
        with pytest.raises(UserError, match=r"fake: refuse: ValueError: no such mode \(log: "):
            peer.ask("refuse")
        assert peer.ask("generate")["wall_s"] == 1.0

    def test_a_peer_that_dies_for_want_of_a_module_says_make_peers(self, fake_peer):
        with pytest.raises(UserError, match=r"exit code 1.*ModuleNotFoundError.*make peers"):
            fake_peer().ask("die")

    def test_a_late_answer_ends_the_peer(self, fake_peer, monkeypatch):
        monkeypatch.setattr("launch.peers.process._EXIT_S", 0.1)
        peer = fake_peer()
        with pytest.raises(UserError, match="no answer to 'sleep' after 0 s"):
            peer.ask("sleep", timeout_s=0.2)
        assert not peer.process.is_running()

    def test_frozen_and_thawed(self, fake_peer):
        peer = fake_peer()
        peer.ask("generate")
        peer.freeze()
        wait_for(peer, psutil.STATUS_STOPPED)
        peer.thaw()
        assert peer.ask("generate")["wall_s"] == 1.0

    def test_closed_while_frozen(self, fake_peer):
        peer = fake_peer()
        peer.freeze()
        peer.close()
        assert not peer.process.is_running()

    def test_a_missing_environment_says_make_peers(self, tmp_path):
        with pytest.raises(UserError, match="make peer-llama-cpp"):
            find_interpreter(tmp_path / "bin" / "python", "peer-llama-cpp")
        assert find_interpreter(sys.executable) == Path(sys.executable)

    def test_the_launcher_says_so_in_one_line(self, tmp_path):
        done = programs.run("launch.bench_serve", f"--peer_python={tmp_path}/none", f"--workdir={tmp_path}")
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: peer_python: ") and "`make peers`" in done.stderr
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("program", "libraries"),
        [
            ("transformers_serve.py", {"torch", "transformers"}),
            ("llama_cpp_serve.py", {"gguf", "llama_cpp", "numpy"}),
            ("answering.py", set()),
        ],
    )
    def test_the_peers_programs_import_nothing_of_ours(self, program, libraries):
        source = Path(__file__).parents[2] / "launch" / "peers" / program
        imported = set()
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(node.module.split(".")[0])
        assert imported <= set(sys.stdlib_module_names) | libraries | {"answering"}


def wait_for(peer: PeerProcess, status: str) -> None:
    deadline = time.monotonic() + 300
    while peer.process.status() != status:
        assert time.monotonic() < deadline
        time.sleep(0.01)


WORKLOAD = Workload(requests=3, prompt_tokens=(4, 6), output_tokens=(2, 4), vocab_size=50)
STATIC = PeerMode("generate", "static", {"slow": 3.0})
PAGED = PeerMode("generate_batch", "paged", {"slow": 2.0})


def answered(requests, wall: float) -> Measured:
    timing = RequestTiming(
        arrival_s=10.0,
        scheduled_s=10.0,
        first_token_s=10.5,
        finished_s=11.0,
        prompt_tokens=4,
        generation_tokens=3,
        cached_tokens=0,
        finish_reason="length",
        n=1,
        max_tokens=3,
        token_times=(10.5, 10.6, 10.9),
    )
    tokens = [[i] * n for i, n in enumerate(requests.max_tokens)]
    return Measured(wall, 2 * wall, tokens, (timing,), ((10, 2), (3, 3)))


class TestContest:
    @pytest.fixture
    def contest(self, fake_peer):
        self.seen = []
        self.peers = {}

        def open_peer(policy):
            self.peers[policy] = fake_peer(policy)
            return self.peers[policy]

        def ours(name, wall):
            def answer(requests):
                for peer in self.peers.values():
                    wait_for(peer, psutil.STATUS_STOPPED)
                self.seen.append((name, requests.prompts))
                return answered(requests, wall)

            return answer

        contest = Contest(
            {"http": ours("http", 1.0), "in_process": ours("in_process", 0.5)}, open_peer, WORKLOAD, Progress(20)
        )
        yield contest
        contest.close()

    def test_rounds_turn_the_order_around_and_peers_are_frozen_meanwhile(self, contest):
        rounds = contest.rounds(3, [STATIC, PAGED], first_variant=2)
        assert [list(r) for r in rounds] == [
            ["http", "in_process", "generate", "generate_batch"],
            ["generate_batch", "generate", "in_process", "http"],
            ["http", "in_process", "generate", "generate_batch"],
        ]
        assert [{name: run.variant for name, run in r.items()} for r in rounds] == [
            {"http": v, "in_process": v + 1, "generate": v, "generate_batch": v} for v in (2, 4, 6)
        ]
        assert self.seen[0] == ("http", WORKLOAD.draw(2).prompts)
        # No prompt is answered twice by our engine.
        prompts = [tuple(p) for _, drawn in self.seen for p in drawn]
        assert len(set(prompts)) == len(prompts)

    def test_trials_skip_what_fails_and_the_fastest_of_each_kind_wins(self, contest):
        slower = PeerMode("generate", "static", {"slow": 9.0})
        refused = PeerMode("refuse", "broken", {})
        tried = contest.trials([slower, refused, STATIC, PAGED], variant=0)
        assert [mode for mode, _ in tried] == [slower, STATIC, PAGED]
        assert fastest(tried, quiet=True) == {"generate": STATIC, "generate_batch": PAGED}

    def test_under_foreign_load_cpu_time_chooses(self):
        tried = [
            (mode, Run("generate", 0, Measured(wall, cpu, []), 1.0))
            for mode, wall, cpu in ((STATIC, 1, 5), (PAGED, 2, 4))
        ]
        tried = [(dataclasses.replace(mode, kind="generate"), run) for mode, run in tried]
        assert fastest(tried, quiet=True)["generate"].title == STATIC.title
        assert fastest(tried, quiet=False)["generate"].title == PAGED.title

    def test_one_process_for_each_wait_policy(self, contest):
        contest.trials([STATIC, dataclasses.replace(PAGED, wait_policy="ACTIVE")], variant=0)
        assert set(self.peers) == {"PASSIVE", "ACTIVE"}
        contest.keep({"ACTIVE"})
        assert not self.peers["PASSIVE"].process.is_running()
        assert self.peers["ACTIVE"].process.is_running()

    def test_figures_of_a_whole_contest(self, contest, tmp_path):
        rounds = contest.rounds(3, [STATIC, PAGED], first_variant=0)
        modes = {"generate": STATIC, "generate_batch": PAGED}
        # A machine that slows down and comes back: each round is held against the products around it.
        usual, slow = MatmulTimes((1, 20), (0.05, 1.0), (0.1, 2.0)), MatmulTimes((1, 20), (0.1, 2.0), (0.2, 4.0))
        limits = [usual, slow, usual]
        requests = WORKLOAD.draw(0)
        agreement = compare(
            requests.prompts,
            requests.max_tokens,
            rounds[0]["http"].measured.tokens,
            rounds[0]["generate"].measured.tokens,
            lambda tokens: pytest.fail("the answers are equal"),
        )
        quiet = [{k: dataclasses.replace(run, foreign_cores=0.1) for k, run in r.items()} for r in rounds]
        found = report.figures("transformers", quiet, modes, limits, agreement, 0.0)
        assert found["speedup_vs_generate"] == 3.0
        assert found["speedup_vs_generate_batch"] == found["speedup_vs_transformers"] == 2.0
        assert found["speedup_vs_transformers_in_process"] == 4.0
        assert found["cpu_ratio_vs_generate"] == 3.0
        assert found["best_peer_mode"] == PAGED.label
        assert found["ttft_p50_s"] == 0.5
        assert found["tpot_p50_s"] == 0.2
        # Steps of 10 and 3 rows, 2 and 3 sampled: 0.5 + 0.15 + 0.2 + 0.3 CPU seconds of products; we took 2.
        assert found["matmul_limit_cpu_s"] == 1.15
        assert found["matmul_share"] == round(2 / 1.15, 3)
        assert found["tokens_agree"] and found["equal_output_counts"] and found["answers_equal"] == 3
        assert found["conclusive"]
        assert found["contestants"]["ours_http"]["tokens_per_s"] == requests.output_tokens
        summary = {
            **found,
            "scale": "tiny",
            "workload": {"requests": 3},
            "dtype": "float32",
            "cpu": "?",
            "recompilations": 0,
            "peer": "transformers",
            **report.overhead(quiet, SimpleNamespace(steps=4, host_seconds=0.002)),
        }
        # Two steps each; over HTTP one CPU second more than without.
        assert (summary["engine_ms_per_step"], summary["http_cpu_ms_per_step"]) == (0.5, 500.0)
        assert json.loads(json.dumps(summary)) == summary
        assert "speed-up" in report.text(summary)
        report.plot(found["contestants"], report.title(summary), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class TestStatistics:
    def rounds(self, *pairs, foreign=0.0):
        def run(name, wall):
            return Run(name, 0, Measured(wall, wall, [[1, 2]]), foreign)

        return [{"http": run("http", a), "generate": run("generate", b)} for a, b in pairs]

    def test_the_speedup_is_the_median_of_ratios(self):
        assert report.speedup(self.rounds((1, 2), (10, 15), (1, 100)), "http", "generate") == 2.0

    def test_foreign_load_refuses_a_conclusion(self):
        assert report.disturbance(self.rounds((1, 2), foreign=0.3), 0.3)["conclusive"]
        for foreign, before in ((0.31, 0.0), (0.0, 0.31)):
            found = report.disturbance(self.rounds((1, 2), foreign=foreign), before)
            assert not found["conclusive"]
            assert "other programs used" in found["why_not_conclusive"]

    def test_the_meter_counts_our_own_work_as_ours(self):
        with LoadMeter() as meter:
            until = time.process_time() + 0.2
            while time.process_time() < until:
                pass
        assert 0.2 <= meter.own_cpu_s < 2.0
        assert meter.wall_s >= 0.19
        assert meter.foreign_cores >= 0.0

    def test_the_machine_is_described(self):
        assert set(describe()) == {"cpu", "cpu_flags", "cores"}


class TestMatmulLimit:
    def test_linear_between_the_rows_measured_and_beyond(self):
        times = MatmulTimes((1, 4, 8), (1.0, 2.0, 6.0), (10.0, 10.0, 20.0))
        assert times.limit([(1, 0)]) == 1.0
        assert times.limit([(6, 1)]) == 4.0 + 10.0
        assert times.limit([(16, 8), (4, 4)]) == 12.0 + 20.0 + 2.0 + 10.0

    def test_mean_of_two(self):
        times = [MatmulTimes((1, 4), (1.0, 2.0), (10.0, 20.0)), MatmulTimes((1, 4), (3.0, 2.0), (20.0, 30.0))]
        assert matmul_limit.mean(times) == MatmulTimes((1, 4), (2.0, 2.0), (15.0, 25.0))

    def test_measured_on_a_tiny_model(self):
        times = matmul_limit.Products(TINY, 6).measure(seconds_each=0.0)
        assert times.rows == (1, 4, 6)
        assert all(s > 0 for s in times.layers_s + times.head_s)

    def test_every_layer_is_in_the_loop(self):
        x = (jnp.ones((2, 3)), jnp.ones((2, 4)))
        stacks = (
            jnp.stack([jnp.full((3, 5), i) for i in (1.0, 2.0)]),
            jnp.stack([jnp.full((4, 6), i) for i in (1.0, 2.0)]),
        )
        out = matmul_limit._through_layers(x, stacks)
        np.testing.assert_array_equal(out[0], np.full((2, 5), 6.0))
        np.testing.assert_array_equal(out[1], np.full((2, 6), 8.0))


class TestAgreement:
    def compare(self, ours, theirs, margin=0.0):
        asked = []

        def margin_at(tokens):
            asked.append(list(tokens))
            return margin

        return compare([[7, 8], [9]], [3, 2], ours, theirs, margin_at), asked

    def test_equal_answers(self):
        found, asked = self.compare([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]])
        assert found.tokens_agree and found.equal == found.compared == 2 and not asked

    def test_only_the_first_difference_counts_and_is_looked_at_there(self):
        found, asked = self.compare([[1, 2, 3], [4, 5]], [[1, 9, 8], [4, 5]], margin=5e-4)
        assert asked == [[7, 8, 1]]
        assert found.tokens_agree and found.equal == 1
        (difference,) = found.differences
        assert (difference.request, difference.position, difference.ours, difference.theirs) == (0, 1, 2, 9)

    def test_bfloat16_is_allowed_more(self):
        found, _ = self.compare([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 6]], margin=0.05)
        assert not found.tokens_agree
        assert (Agreement(near_tie=NEAR_TIE["bfloat16"]) + found).tokens_agree

    def test_a_clear_difference_is_a_disagreement(self):
        assert not self.compare([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 6]], margin=2e-3)[0].tokens_agree

    def test_a_missing_token_is_unequal_work(self):
        found, _ = self.compare([[1, 2, 3], [4, 5]], [[1, 2], [4, 5]])
        assert not found.counts_equal and not found.tokens_agree

    def test_findings_add_up(self):
        one, _ = self.compare([[1, 2, 3], [4, 5]], [[1, 2, 0], [4, 5]])
        total = one + Agreement(counts_equal=False)
        assert (total.compared, total.equal, total.counts_equal, len(total.differences)) == (2, 1, False, 1)

    def test_the_plain_forward_gives_the_margin_of_the_two_best_logits(self, tmp_path):
        decoder = Decoder(TINY, rngs=nnx.Rngs(0))
        save_decoder(decoder, tmp_path / "model")
        tokens = [3, 1, 4, 1, 5]
        logits, _ = decoder(jnp.array(tokens), jnp.arange(5), dense_attention())
        second, first = np.sort(np.asarray(logits)[-1])[-2:]
        assert PlainForward(tmp_path / "model", window=8)(tokens) == pytest.approx(first - second, abs=1e-6)


TINY = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    qkv_bias=True,
)


def test_the_model_is_qwens_shape_and_what_is_cut_is_said():
    assert scale_of(model_config()) == "Qwen2.5-0.5B shape, whole"
    assert "6 of 24 layers" in scale_of(model_config(layers=6))
    config = model_config()
    assert (config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads) == (896, 4864, 14, 2)


def test_the_number_tokenizer_writes_tokens_as_numbers():
    tokenizer = number_tokenizer(50)
    assert tokenizer.vocab_size == 50
    assert tokenizer.decode([3, 14, 15]) == "3 14 15"
    assert tokenizer.encode("3 14 15") == [3, 14, 15]
    assert tokenizer.eos_token_ids == ()
