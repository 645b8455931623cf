"""Answers a file of requests in OpenAI's batch format with an engine in this process.

    python -m launch.batch --input=in.jsonl --output=out.jsonl --model=FOLDER

A line of the input:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

and of the output:

    {"id": "...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

Every answer is on disk as soon as it is complete. Started again with the same files after an interruption, it answers
what is missing.
"""

from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine import EngineDead
from jaxstack.runtime.errors import UserError
from jaxstack.serving import ServerConfig
from jaxstack.serving.batch_file import answer_file
from launch import engine_flags, job

_INPUT = flags.DEFINE_string("input", None, "file of requests, one a line")
_OUTPUT = flags.DEFINE_string("output", None, "file of answers; continued if it exists")
_NAME = flags.DEFINE_string("served_model_name", None, "what requests call the model; by default the folder's name")
_CONCURRENCY = flags.DEFINE_integer("concurrency", None, "requests under way; by default twice max_sequences")
flags.adopt_module_key_flags(engine_flags)


def run() -> dict[str, Any]:
    if not _INPUT.value:
        raise job.BadUsage("--input is missing; expected a file of requests")
    if not _OUTPUT.value:
        raise job.BadUsage("--output is missing; expected a file for the answers")
    source, target = Path(_INPUT.value), Path(_OUTPUT.value)
    if target.exists() and source.exists() and target.samefile(source):
        raise job.BadUsage(f"--output: found the input file {str(source)!r}, expected another")
    settings = engine_flags.engine_config()
    concurrency = 2 * settings.max_sequences if _CONCURRENCY.value is None else _CONCURRENCY.value
    if concurrency < 1:
        raise job.BadUsage(f"--concurrency: found {concurrency}, expected an integer >= 1")
    folder = engine_flags.model_folder()
    config = ServerConfig(
        model_name=_NAME.value or folder.resolve().name,
        tool_parser=engine_flags.TOOLS.value,
        reasoning_parser=engine_flags.REASONING.value,
    )
    engine = engine_flags.load_engine(folder, settings)
    try:
        engine.start()
        summary = answer_file(engine, source, target, config, concurrency=concurrency)
    except EngineDead as error:
        raise UserError(f"the engine has died ({error}); its log tells more; start again to go on") from error
    finally:
        engine.close()
    return {"output": str(target), **summary}


if __name__ == "__main__":
    job.main(run)
