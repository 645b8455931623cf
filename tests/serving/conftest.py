"""One engine with a tiny random model and one server for all tests of this folder: compiling it takes longest."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from jaxstack.engine import Engine, EngineConfig
from jaxstack.models import lora
from jaxstack.models.decoder import DecoderConfig
from jaxstack.models.peft_format import save_peft
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.training.initialize import fresh_decoder

MODEL = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=byte_tokenizer().vocab_size + 3,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    qkv_bias=True,
    max_position_embeddings=2048,
    initializer_range=0.3,
)


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the model that changes every answer."""
    model, config = fresh_decoder(MODEL), lora.LoraConfig(r=2, alpha=64.0)
    lora.attach(model, config, seed=1)
    rng = np.random.default_rng(0)
    factors = {
        name: dataclasses.replace(factor, b=rng.normal(size=factor.b.shape).astype(np.float32))
        for name, factor in lora.adapter_factors(model, config).items()
    }
    lora.set_adapters(model, [factors])
    folder = tmp_path_factory.mktemp("adapters") / "other"
    save_peft(model, folder, config)
    return folder


# The adapter is made first: the engine counts what this process compiles once it is warm.
@pytest.fixture(scope="session")
def engine(adapter_folder: Path) -> Iterator[Engine]:
    settings = EngineConfig(
        max_sequences=4, max_batch_tokens=64, page_size=8, num_pages=1024, max_adapters=2, max_adapter_rank=2
    )
    engine = Engine(fresh_decoder(MODEL), byte_tokenizer(), settings)
    engine.start(progress=False)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[BackgroundServer]:
    config = ServerConfig(port=0, model_name="tiny", max_body_bytes=100_000)
    with BackgroundServer(engine, config) as server:
        yield server


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=600) as http:
        yield http


@pytest.fixture(scope="session")
def client(server: BackgroundServer) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, http_client=http) as client:
        yield client
