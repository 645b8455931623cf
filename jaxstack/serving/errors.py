"""Errors as OpenAI clients expect them: an HTTP status and `{"error": {"message", "type", "param", "code"}}`."""

import re
from collections.abc import Mapping
from typing import Any

from jaxstack.engine.errors import EngineDead, PromptTooLong, QueueFull, UnknownAdapter
from jaxstack.runtime.errors import UserError


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class ApiError(Exception):
    """An answer other than 2xx.

    Args:
      status: HTTP status.
      message: one line for the user.
      code: a word for programs, for instance "context_length_exceeded".
      param: the field of the request that is wrong.
      headers: further response headers.
      extra: further fields of the error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers, self.extra = dict(headers or {}), dict(extra or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.extra}
        return {"error": error}


def bad_field(param: str, found: Any, expected: str) -> ApiError:
    """400 for one field of the body; `found` is shortened."""
    return ApiError(400, f"{param}: found {shorten(found)}, expected {expected}", param=param)


def unavailable(message: str, code: str, retry_after_s: int = 1, **extra: Any) -> ApiError:
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after_s)}, extra=extra)


def shorten(found: Any, limit: int = 80) -> str:
    text = repr(found)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def as_api_error(error: Exception) -> ApiError | None:
    """The answer to an error of the floors below; None for one that is our own fault."""
    message = " ".join(str(error).split())
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
    if isinstance(error, PromptTooLong):
        return ApiError(400, message, code="context_length_exceeded", param="prompt")
    if isinstance(error, UnknownAdapter):
        return ApiError(404, message.replace("adapter:", "model:", 1), code="model_not_found", param="model")
    if isinstance(error, EngineDead):
        return unavailable("the engine has stopped", "engine_dead", 10)
    if isinstance(error, UserError):
        # By custom these messages begin with the name of the field.
        named = re.match(r"(\w+):", message)
        return ApiError(400, message, param=named.group(1) if named else None)
    return None
