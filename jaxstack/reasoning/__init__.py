"""Tasks, their graders, and the data that teaches them.

A problem (`countdown.Problem`) becomes a text (`traces.Sample`), a text becomes training rows
(`datasets.write_dataset`), a model trained on those answers held-out problems, and `countdown.grade` says which answers
are right, and why not.

    countdown.py    Countdown-3: problems, split, canonical search, grader
    traces.py       search traces, direct answers, base-skill documents
    relay.py        Relay: chains of look-ups; problems, split, traces right and wrong, grader
    longcot/        thoughts as steps, their perturbations, and the study of what each version teaches
    tokenizer.py    the word-level tokenizers and chat template of the small models
    evaluation.py   a language model's answers to problems, graded
    datasets.py     named data sets as JSONL files that `jaxstack.training` reads
    benchmarks.py   AIME24, MATH500, LiveCodeBench, ...: asked, graded, reported with intervals, resumable;
                    benchmark_tasks.py their files and prompts, benchmark_report.py the figures
    grading/        graders of mathematics, choices and programs
    statistics.py   pass@k, votes, bootstrap
    asking.py       many long answers side by side, each on disk when it is there
"""

from jaxstack.reasoning.countdown import Grade, Problem, candidates, grade, held_out, parse_problem, solve
from jaxstack.reasoning.datasets import write_dataset

__all__ = ["Grade", "Problem", "candidates", "grade", "held_out", "parse_problem", "solve", "write_dataset"]
