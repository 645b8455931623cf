"""Makes long chain-of-thought training data with a teacher: generate, rewrite, reject, and write ShareGPT rows.

    python -m launch.distill_data --problems=numina.parquet --url=http://127.0.0.1:8000/v1 --workdir=work/data
    python -m launch.distill_data --problems=a.jsonl --model=FOLDER --rewriter_url=http://127.0.0.1:8001/v1 \\
        --evaluation=AIME24:aime.parquet,MATH500:math.jsonl

Problems are files (JSONL, JSON, CSV, parquet) with `problem` or `question`, and `answer`, a boxed `solution`, or
`input_output` of programs, which are run with limits but NOT in a sandbox. Without a rewriter the teacher's answers are
divided at </think>. Problems that share ten words in a row with an evaluation problem are left out.

The workdir gets the rows of every stage, data.jsonl, rejected.jsonl with reasons, and summary.json. Started again in
the same workdir it goes on where it was.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine import SamplingParams
from jaxstack.reasoning.benchmark_tasks import find_task, load_questions
from jaxstack.reasoning.longcot.recipe import RecipeConfig, load_problems, make_data
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from jaxstack.serving import EndpointModel, LanguageModel
from launch import engine_flags, job

_PROBLEMS = flags.DEFINE_list("problems", [], "files of problems")
_EVALUATION = flags.DEFINE_list("evaluation", [], "benchmarks to keep out: TASK:FILE,TASK:FILE")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "of the teacher")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 16_384, "of an answer; longer ones are rejected")
_URL = flags.DEFINE_string("url", None, "the teacher's endpoint, with the /v1, instead of a model in this process")
_URL_MODEL = flags.DEFINE_string("url_model", None, "the teacher's name there; by default the first it lists")
_API_KEY = flags.DEFINE_string("api_key", None, "key for the endpoints")
_REWRITER = flags.DEFINE_string("rewriter_url", None, "the rewriter's endpoint; by default nothing is rewritten")
_REWRITER_MODEL = flags.DEFINE_string("rewriter_model", None, "the rewriter's name there")
_EXTENDED = flags.DEFINE_bool("extended", True, "whether the endpoints take vLLM's fields beside OpenAI's")
_OPENED = flags.DEFINE_bool("thought_opened", False, "the teacher's prompt ends inside its thought")
_CONCURRENCY = flags.DEFINE_integer("concurrency", 32, "answers under way at once")
_GRADERS = flags.DEFINE_integer("grader_workers", 2, "answers graded at once")
_WORKDIR = flags.DEFINE_string("workdir", "work/distill", "where everything goes; a run found there is continued")
flags.adopt_module_key_flags(engine_flags)

# More than this share of failed requests is a failed run.
_TOLERATED = 0.01


def _evaluation() -> dict[str, str]:
    texts: dict[str, str] = {}
    for pair in _EVALUATION.value:
        name, colon, file = pair.partition(":")
        if not colon:
            raise job.BadUsage(f"--evaluation: found {pair!r}, expected TASK:FILE,...")
        task = find_task(name)
        texts |= {f"{task.name}/{question.id}": question.problem for question in load_questions(task, [file])}
    return texts


def _config() -> RecipeConfig:
    try:
        return RecipeConfig(
            generation=SamplingParams(temperature=_TEMPERATURE.value, max_tokens=_MAX_TOKENS.value),
            rewriting=SamplingParams(temperature=0.7, max_tokens=_MAX_TOKENS.value),
            thought_opened=_OPENED.value,
            concurrency=_CONCURRENCY.value,
            grader_workers=_GRADERS.value,
        )
    except UserError as error:
        raise job.BadUsage(f"--{error}") from None


def _endpoint(url: str, model: str | None) -> EndpointModel:
    return EndpointModel(
        url, model=model, api_key=_API_KEY.value, extended=_EXTENDED.value, concurrency=_CONCURRENCY.value
    )


@contextlib.contextmanager
def _teacher() -> Iterator[tuple[LanguageModel, str]]:
    """The teacher, and its name."""
    if _URL.value:
        with _endpoint(_URL.value, _URL_MODEL.value) as endpoint:
            yield endpoint, endpoint.model
        return
    with engine_flags.model_here() as (model, name):
        yield model, name


def run() -> dict[str, Any]:
    if not _PROBLEMS.value:
        raise job.BadUsage("--problems is missing; expected files of problems")
    config, evaluation, problems = _config(), _evaluation(), load_problems(_PROBLEMS.value)
    workdir = Path(_WORKDIR.value)
    with contextlib.ExitStack() as stack:
        teacher, label = stack.enter_context(_teacher())
        rewriter: EndpointModel | None = None
        if _REWRITER.value:
            rewriter = stack.enter_context(_endpoint(_REWRITER.value, _REWRITER_MODEL.value))
            label = f"{label} and {rewriter.model}"
        summary = make_data(teacher, problems, config, workdir, rewriter=rewriter, evaluation=evaluation, label=label)
    write_summary(workdir, summary)
    if summary["failed"] > _TOLERATED * summary["problems"]:
        raise UserError(
            f"{summary['failed']} requests failed, more than {_TOLERATED:.0%}; start again in {str(workdir)!r} to retry"
        )
    return summary


if __name__ == "__main__":
    job.main(run)
