r"""Compares mathematical answers with math-verify: a program that `MathGrader` starts, and kills when it hangs.

One job a line of JSON on stdin, one result a line on stdout. It imports nothing of jaxstack, so it starts in the time
that sympy takes. The time limit is the parent's: a signal handler of Python would wait for a product of huge integers
to end. An alarm ends a worker whose parent was killed.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any


def main() -> None:
    alarm_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no result

    def tell(**result: Any) -> None:
        results.write(json.dumps(result) + "\n")
        results.flush()

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable(logging.CRITICAL)
    try:
        compare = _comparison()
    except ImportError as error:
        tell(missing=str(error))
        return
    tell(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
        try:
            equal = compare(**job)
        except MemoryError:
            tell(error="out of memory")
        except Exception as error:
            tell(error=f"{type(error).__name__}: {error}"[:200])
        else:
            tell(equal=equal)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _comparison() -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # A bare \frac12 parses to nothing, so everything is boxed. Neither call may use its own time limit: that needs
    # signals, and does not end a long product.
    reading = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> Any:
        return parse("\\boxed{" + text + "}", extraction_config=reading, parsing_timeout=None)

    def close(gold: Any, answer: Any, tolerance: float) -> bool:
        try:
            return abs(float(gold[0]) - float(answer[0])) <= 1.01 * tolerance
        except (TypeError, ValueError, IndexError, OverflowError, AttributeError):
            return False

    def equal(gold: str, answer: str, tolerance: float | None) -> bool:
        read_gold, read_answer = read(gold), read(answer)
        if tolerance is not None and close(read_gold, read_answer, tolerance):
            return True
        # Not symmetric: the gold comes first.
        return bool(verify(read_gold, read_answer, timeout_seconds=None, raise_on_error=True))

    def compare(golds: list[str], answers: list[str], tolerance: float | None) -> bool:
        """Whether the two lists hold the same values, in any order."""
        left = list(answers)
        for gold in golds:
            match = next((i for i, answer in enumerate(left) if equal(gold, answer, tolerance)), None)
            if match is None:
                return False
            del left[match]
        return not left

    return compare


if __name__ == "__main__":
    main()
