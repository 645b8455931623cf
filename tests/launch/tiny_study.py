"""`python -m tests.launch.tiny_study WORKDIR CONFIG`: the study of long thoughts, by a configuration in JSON."""

import json
import sys
from pathlib import Path

from jaxstack.reasoning.longcot.config import StudyConfig
from jaxstack.reasoning.longcot.study import run_study

if __name__ == "__main__":
    print(run_study(StudyConfig.from_json(json.loads(sys.argv[2])), Path(sys.argv[1])).table)
