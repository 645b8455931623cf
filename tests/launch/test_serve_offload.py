"""`python -m launch.serve --offload`: a mixture of experts four times the size of its device answers an OpenAI client
with the tokens of the whole model, and stays within its budget; mistakes get one line.
"""

import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from byte_model import save
from flax import nnx
from programs import run, start

from jaxstack.models import DecoderConfig, MoeConfig, dense_attention
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.tokenizer import byte_tokenizer

BUDGET = 2_500_000
SERVE = ("launch.serve", "--port=0", "--machine=emulated_t4")
MODEL = DecoderConfig(
    architecture="MixtralForCausalLM",
    vocab_size=byte_tokenizer().vocab_size,
    hidden_size=32,
    intermediate_size=192,
    num_layers=18,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    moe=MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=192),
    initializer_range=0.3,
)
PROMPTS = [[104, 101, 108, 108, 111], [7] * 20, [1, 2, 3, 250]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "large"
    save(folder, MODEL)
    return folder


def assert_greedy(folder: Path, answers: list[list[int]]) -> None:
    """Every token is the likeliest after those before it in the whole model, where rounding does not decide."""
    graph, state = nnx.split(load_decoder(folder, progress=False))
    forward = jax.jit(lambda s, t: nnx.merge(graph, s)(t, jnp.arange(64), dense_attention())[0])
    compared = 0
    for prompt, answer in zip(PROMPTS, answers):
        tokens = np.zeros(64, np.int32)
        tokens[: len(prompt) + len(answer)] = prompt + answer
        rows = np.asarray(forward(state, tokens))[len(prompt) - 1 :]
        for row, token in zip(rows, answer):
            if np.diff(np.sort(row)[-2:])[0] > 1e-4:
                assert token == row.argmax()
                compared += 1
    assert compared > 15


def test_a_model_four_times_its_device(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size > 4 * BUDGET
    server = start(
        *SERVE, f"--model={folder}", "--offload=cgopipe", f"--device_budget_gb={BUDGET / 1e9}", "--max_sequences=3",
        "--max_batch_tokens=16", "--pages=40",
    )  # fmt: skip
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("serving large at"), server.communicate()
    client = openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0, timeout=600)
    answers, asked = [], {"ignore_eos": True, "return_token_ids": True}
    for prompt in PROMPTS:
        answer = client.completions.create(model="large", prompt=prompt, max_tokens=6, temperature=0, extra_body=asked)
        answers.append(answer.choices[0].model_extra["token_ids"])
    streamed = client.completions.create(
        model="large", prompt=PROMPTS[0], max_tokens=6, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    assert sum(1 for _ in streamed) > 0
    server.send_signal(signal.SIGTERM)
    out, errors = server.communicate(timeout=600)
    assert server.returncode == 0, errors
    found = json.loads(out.splitlines()[-1])
    assert 0 < found["device_peak_bytes"] <= found["device_budget_bytes"] == BUDGET
    assert found["recompilations"] == 0 and found["generation_tokens"] == 24
    (plan,) = [text for text in errors.splitlines() if text.startswith("offload: ")]
    assert plan.startswith("offload: S1 in ") and "feed-forward on the device" in plan and "GB" in plan
    assert found["device_peak_bytes"] > BUDGET / 2 and found["weight_pages_resident"] < 0.25
    assert [len(answer) for answer in answers] == [6, 6, 6]
    assert_greedy(folder, answers)


def test_mistakes_get_one_line(folder: Path) -> None:
    cases = {
        ("--offload=cgopipe", "--device_budget_gb=0.0002"): "device budget: found 0.0002 GB, expected at least",
        ("--offload=auto",): "--device_budget_gb: found none",
        ("--device_budget_gb=1",): "--device_budget_gb: found it without --offload",
        ("--offload=auto", "--device_budget_gb=0.002", "--machine=z"): "machine: found 'z', expected a file or one of",
    }
    sizes = ("--max_sequences=2", "--max_batch_tokens=16", "--pages=40")
    for flags, message in cases.items():
        done = run(*SERVE, f"--model={folder}", *sizes, *flags)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr
        assert message in done.stderr
