"""The JSON object in a request's body."""

import json
from typing import Any

from jaxstack.serving.errors import ApiError


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises ApiError for anything else, NaN and Infinity included."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "body: JSON nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"body: not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"body: found a JSON {type(content).__name__}, expected an object", code="invalid_json")
    return content
