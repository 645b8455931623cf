"""Measures a model on a reasoning benchmark: sampled answers and a greedy one to each question, graded, with intervals.

    python -m launch.reason_eval --task=countdown                                      the embedded model, no data
    python -m launch.reason_eval --task=AIME24 --data=aime.parquet --model=FOLDER
    python -m launch.reason_eval --task=MATH500 --data=test.jsonl --url=http://127.0.0.1:8000/v1

Data are files of the published form (JSONL, JSON, CSV, parquet), several separated by commas; nothing is downloaded.
Tasks: AIME24, AMC23, MATH500, OlympiadBench, GPQA-Diamond, LiveCodeBench, MMLU, MMLU-Pro, countdown. LiveCodeBench runs
the programs that the model writes, with limits but NOT in a sandbox.

The workdir gets answers.jsonl, every answer as soon as it is graded, and summary.json. Started again in the same
workdir it goes on where it was; with more samples or questions it adds to them.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine import SamplingParams
from jaxstack.reasoning.benchmarks import EvaluationConfig, evaluate, find_task, load_questions
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import plot_curves, write_summary
from jaxstack.serving import EndpointModel, LanguageModel
from launch import engine_flags, job

_TASK = flags.DEFINE_string("task", "countdown", "the benchmark")
_DATA = flags.DEFINE_list("data", [], "files with its questions")
_LIMIT = flags.DEFINE_integer("limit", None, "questions asked, from the first; by default all")
_SAMPLES = flags.DEFINE_integer("samples", 8, "answers sampled to each question")
_GREEDY = flags.DEFINE_bool("greedy", True, "also take a greedy answer to each question")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.6, "of sampled answers")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "of sampled answers")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "of an answer; by default the rest of the model's window")
_BUDGETS = flags.DEFINE_list("budgets", [], "token budgets to report the accuracy at, too")
_SYSTEM = flags.DEFINE_string("system", None, "system message; by default none")
_THINKING: Any = flags.DEFINE_enum(
    "thinking", "default", ["default", "on", "off"], "what the chat template is told of enable_thinking"
)
_OPENED = flags.DEFINE_bool(
    "thought_opened", None, "the prompt ends inside the thought; found out for a model in this process"
)
_SAMPLE_SEED = flags.DEFINE_integer("sample_seed", 0, "of the sampled answers")
_CONCURRENCY = flags.DEFINE_integer("concurrency", 32, "answers under way at once")
_GRADERS = flags.DEFINE_integer("grader_workers", 2, "mathematical answers compared, or programs run, at once")
_URL = flags.DEFINE_string("url", None, "endpoint to ask, with the /v1, instead of a model in this process")
_API_KEY = flags.DEFINE_string("api_key", None, "key for the endpoint")
_URL_MODEL = flags.DEFINE_string("url_model", None, "the model's name there; by default the first it lists")
_EXTENDED = flags.DEFINE_bool("extended", True, "whether the endpoint takes vLLM's fields beside OpenAI's")
_WORKDIR = flags.DEFINE_string("workdir", "work/reason_eval", "where everything goes; a run found there is continued")
flags.adopt_module_key_flags(engine_flags)

# More than this share of failed answers is a failed run.
_TOLERATED = 0.01


def _config() -> EvaluationConfig:
    try:
        budgets = tuple(int(budget) for budget in _BUDGETS.value)
    except ValueError:
        raise job.BadUsage(f"--budgets: found {','.join(_BUDGETS.value)!r}, expected integers") from None
    try:
        return EvaluationConfig(
            samples=_SAMPLES.value,
            greedy=_GREEDY.value,
            sampling=SamplingParams(temperature=_TEMPERATURE.value, top_p=_TOP_P.value, max_tokens=_MAX_TOKENS.value),
            seed=_SAMPLE_SEED.value,
            budgets=budgets,
            system=_SYSTEM.value,
            enable_thinking={"default": None, "on": True, "off": False}[_THINKING.value],
            thought_opened=_OPENED.value,
            concurrency=_CONCURRENCY.value,
            grader_workers=_GRADERS.value,
        )
    except UserError as error:
        raise job.BadUsage(f"--{error}") from None


@contextlib.contextmanager
def _model(config: EvaluationConfig) -> Iterator[tuple[LanguageModel, str]]:
    """The model, and its name."""
    if _URL.value:
        with EndpointModel(
            _URL.value,
            model=_URL_MODEL.value,
            api_key=_API_KEY.value,
            extended=_EXTENDED.value,
            concurrency=config.concurrency,
        ) as endpoint:
            yield endpoint, endpoint.model
        return
    with engine_flags.model_here() as (model, name):
        yield model, name


def run() -> dict[str, Any]:
    try:
        task = find_task(_TASK.value)
    except UserError as error:
        raise job.BadUsage(f"--task: {error}") from None
    config = _config()
    questions = load_questions(task, _DATA.value, limit=_LIMIT.value)
    workdir = Path(_WORKDIR.value)
    with _model(config) as (model, name):
        report = evaluate(model, task, questions, config, workdir, label=name)
    print(report.table(), file=sys.stderr)
    summary = report.as_json()
    write_summary(workdir, summary)
    if report.pass_at:
        curve = [(k, interval.mean) for k, interval in report.pass_at.items()]
        plot_curves(workdir / "pass_at_k.png", {task.name: curve}, x="k", y="pass@k")
    if report.failed_share > _TOLERATED:
        raise UserError(
            f"{report.failed} answers failed, more than {_TOLERATED:.0%}; start again in {str(workdir)!r} to retry them"
        )
    return summary


if __name__ == "__main__":
    job.main(run)
