"""`POST /v1/embeddings`: texts in, vectors of length one out."""

import base64
from typing import Any, Literal

import numpy as np
import pydantic

from jaxstack.engine import Engine, PromptTooLong
from jaxstack.runtime.errors import UserError
from jaxstack.serving.clients import Caller
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.errors import ApiError, bad_field
from jaxstack.serving.prompts import adapter_of, need_tokenizer
from jaxstack.serving.protocol import read_as, read_prompts


class EmbeddingsRequest(pydantic.BaseModel):
    """OpenAI's fields, and two of vLLM's kind: `pooling`, by default the server's, and `add_special_tokens`."""

    model_config = pydantic.ConfigDict(strict=True)
    model: str | None = None
    input: Any = None
    encoding_format: str | None = None
    dimensions: int | None = None
    pooling: str | None = None
    add_special_tokens: bool = True
    user: str | None = None


def embeddings(body: bytes, engine: Engine, config: ServerConfig, caller: Caller | None = None) -> dict[str, Any]:
    """The response object. Blocks until the engine has computed it. `caller` asks; None for this process itself.

    `dimensions` keeps the first ones and makes the vector's length one again, which is meant for models trained so
    that their first dimensions say most.

    Raises:
      ApiError, UserError: what is wrong with the request.
    """
    request = read_as(EmbeddingsRequest, body)
    adapter = adapter_of(request.model, engine, config)
    width = engine.model_config.hidden_size
    if request.encoding_format not in (None, "float", "base64"):
        raise bad_field("encoding_format", request.encoding_format, "float or base64")
    if request.dimensions is not None and not 1 <= request.dimensions <= width:
        raise bad_field("dimensions", request.dimensions, f"an integer from 1 to {width}")
    if request.pooling not in (None, "last", "mean"):
        raise bad_field("pooling", request.pooling, "last or mean")
    pooling: Literal["last", "mean"] = request.pooling or config.pooling  # type: ignore[assignment]
    given = read_prompts(request.input, "input")
    if len(given) > config.max_choices:
        raise ApiError(400, f"input: found {len(given)} texts, expected at most {config.max_choices}", param="input")
    prompts = [
        need_tokenizer(engine).encode(prompt, add_special_tokens=request.add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in given
    ]
    try:
        vectors = engine.embed(prompts, pooling, adapter=adapter, client=caller.client(request.user) if caller else "")
    except UserError as error:
        if not str(error).startswith("prompt:"):
            raise
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        raise ApiError(400, str(error).replace("prompt", "input", 1), code=code, param="input") from None
    data = [
        {"object": "embedding", "index": i, "embedding": _written(_unit(vector, request.dimensions), request)}
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": adapter or config.model_name, "usage": usage}


def _unit(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    exact = vector[:dimensions].astype(np.float64)
    # The zero vector has no direction; it stays.
    return (exact / max(float(np.linalg.norm(exact)), 1e-30)).astype(np.float32)


def _written(vector: np.ndarray, request: EmbeddingsRequest) -> list[float] | str:
    if request.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
