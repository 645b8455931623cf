"""Embeddings over HTTP through the real client; the oracle is `Engine.embed`."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from jaxstack.engine import Engine
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.serving.batch_file import answer_file
from jaxstack.serving.semantic_cache.embedders import RemoteEmbedder

TEXTS = ["hello", "a longer text, é", "x" * 200]  # the last takes several steps of 64 tokens


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def vectors(answer: Any) -> list[np.ndarray]:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [np.asarray(item.embedding) for item in answer.data]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_texts_and_tokens(client: openai.OpenAI, engine: Engine, pooling: Any) -> None:
    own = [unit(vector) for vector in engine.embed(TEXTS, pooling)]
    ids = [byte_tokenizer().encode(text) for text in TEXTS]
    body = {"pooling": pooling}
    # The client asks for base64 unless told otherwise, and reads it itself.
    answer = client.embeddings.create(model="tiny", input=TEXTS, extra_body=body)
    assert answer.model == "tiny" and answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    np.testing.assert_allclose(vectors(answer), own, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors(answer), axis=1), 1.0, atol=1e-6)
    for given, expected in ((TEXTS[1], own[1]), (ids[2], own[2]), ([ids[0]], own[0])):
        answer = client.embeddings.create(model="tiny", input=given, encoding_format="float", extra_body=body)
        np.testing.assert_allclose(vectors(answer), [expected], atol=1e-5)


def test_dimensions(client: openai.OpenAI, engine: Engine) -> None:
    (own,) = engine.embed(["hello"])
    answer = client.embeddings.create(model="tiny", input="hello", dimensions=5)
    np.testing.assert_allclose(vectors(answer), [unit(own[:5])], atol=1e-5)


def test_of_an_adapter(client: openai.OpenAI, engine: Engine, adapter_folder: Path) -> None:
    engine.load_adapter("french", adapter_folder)
    try:
        answer = client.embeddings.create(model="french", input="hello")
        (own,), (plain,) = engine.embed(["hello"], adapter="french"), engine.embed(["hello"])
    finally:
        engine.unload_adapter("french")
    assert answer.model == "french" and np.abs(unit(own) - unit(plain)).max() > 0.01
    np.testing.assert_allclose(vectors(answer), [unit(own)], atol=1e-5)


def test_in_a_batch_file(engine: Engine, tmp_path: Path) -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings", "body": {"input": text}}
        for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    answer_file(engine, source, target, ServerConfig(model_name="tiny"), concurrency=2, progress=False)
    answers = {entry["custom_id"]: entry for entry in map(json.loads, target.read_text().splitlines())}
    found = [answers[str(i)]["response"]["body"]["data"][0]["embedding"] for i in range(len(TEXTS))]
    np.testing.assert_allclose(found, [unit(vector) for vector in engine.embed(TEXTS)], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "message"),
    [
        ({"model": "other", "input": "x"}, 404, "model_not_found", "model", "'other' does not exist here"),
        ({}, 400, None, "input", "found None"),
        ({"input": []}, 400, None, "input", "found []"),
        ({"input": ["x", 1]}, 400, None, "input", "expected a string"),
        ({"input": ""}, 400, None, "input", "no tokens"),
        ({"input": [-1]}, 400, None, "input", "found token id -1"),
        ({"input": "x" * 3000}, 400, "context_length_exceeded", "input", "found 3000 tokens"),
        ({"input": ["x"] * 2000}, 400, None, "input", "found 2000 texts"),
        ({"input": "x", "dimensions": 17}, 400, None, "dimensions", "an integer from 1 to 16"),
        ({"input": "x", "dimensions": 0}, 400, None, "dimensions", "found 0"),
        ({"input": "x", "encoding_format": "hex"}, 400, None, "encoding_format", "float or base64"),
        ({"input": "x", "pooling": "max"}, 400, None, "pooling", "last or mean"),
    ],
)
def test_what_is_refused(
    http: httpx.Client,
    server: BackgroundServer,
    body: dict[str, Any],
    status: int,
    code: str | None,
    param: str,
    message: str,
) -> None:
    answer = http.post(f"{server.base_url}/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_the_cache_s_embedder_of_endpoints(server, client):
    expected = client.embeddings.create(model="tiny", input=["one", "a second text"], encoding_format="float")
    with RemoteEmbedder(server.base_url, "tiny", batch=2) as embedder:
        assert embedder.dim == len(expected.data[0].embedding) and embedder.id.endswith(f":tiny:{embedder.dim}")
        rows = embedder.embed(["one", "a second text", "one", "", "one"])
        np.testing.assert_allclose(rows[:2], [item.embedding for item in expected.data], atol=1e-6)
        np.testing.assert_array_equal(rows[0], rows[4])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        assert embedder.embed([]).shape == (0, embedder.dim)
    with RemoteEmbedder(server.base_url, "tiny", dimensions=5) as embedder:
        assert embedder.dim == 5
    with pytest.raises(UserError, match=r"embeddings of 'other' at .*404"):
        RemoteEmbedder(server.base_url, "other")
