"""`/metrics` is Prometheus text under vLLM's names, and its numbers are those of the requests made."""

import httpx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jaxstack.serving import BackgroundServer
from jaxstack.serving.metrics import _Histogram


def read(http: httpx.Client, server: BackgroundServer) -> dict[str, float]:
    answer = http.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            rest = {name: value for name, value in sample.labels.items() if name != "model_name"}
            found[sample.name + "".join(f"{{{name}={value}}}" for name, value in rest.items())] = sample.value
    return found


def test_a_request_shows_in_every_metric(http: httpx.Client, server: BackgroundServer) -> None:
    body = {"prompt": "abcdefgh", "max_tokens": 7, "temperature": 0, "ignore_eos": True}
    before = read(http, server)
    assert http.post(f"{server.base_url}/completions", json=body).status_code == 200
    after = read(http, server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("vllm:prompt_tokens_total") == 8 and grown("vllm:generation_tokens_total") == 7
    assert grown("vllm:request_success_total{finished_reason=length}") == 1
    assert grown("vllm:prefix_cache_queries_total") == 8
    for name in (
        "time_to_first_token_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
    ):
        assert grown(f"vllm:{name}_count") == 1, name
        assert after[f"vllm:{name}_bucket{{le=+Inf}}"] == after[f"vllm:{name}_count"]
    assert grown("vllm:inter_token_latency_seconds_count") == grown("vllm:time_per_output_token_seconds_count") == 6
    assert grown("vllm:request_prompt_tokens_sum") == 8 and grown("vllm:request_params_max_tokens_sum") == 7
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1 and after["vllm:num_preemptions_total"] >= 0
    assert grown("vllm:iteration_tokens_total_count") == grown("jaxstack:steps_total")
    assert grown("vllm:iteration_tokens_total_sum") == 8 + 6  # the last token is never an input
    assert grown("vllm:iteration_tokens_total_bucket{le=1.0}") == 6
    assert grown("vllm:iteration_tokens_total_bucket{le=8.0}") == 7
    assert after["vllm:corrupted_requests_total"] == 0 and 0 < grown("jaxstack:host_seconds_total") < 60
    assert after["jaxstack:compilations_total"] == 0 and after["jaxstack:warm_up_progress"] == 1
    assert grown("jaxstack:steps_total") >= 7 and 0 <= after["jaxstack:padding_ratio"] < 1
    assert sum(after[f"jaxstack:pages{{state={state}}}"] for state in ("free", "tree", "private")) == 1024


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 9.0]), min_size=1), max_size=5))
def test_histograms_count_as_prometheus_does(batches: list[list[float]]) -> None:
    histogram = _Histogram("h", "", (1.0, 2.0))
    for batch in batches:
        histogram.observe(batch)
    values = np.array([value for batch in batches for value in batch])
    samples = {s.labels.get("le", s.name): s.value for s in histogram.family("m").samples}
    assert [samples[bound] for bound in ("1.0", "2.0", "+Inf")] == [(values <= b).sum() for b in (1, 2, np.inf)]
    assert samples["h_sum"] == values.sum() and samples["h_count"] == len(values)
