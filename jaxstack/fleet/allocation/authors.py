"""Problems in the layout of Melange's authors: one JSON file with types, distribution, rate and slice factor.

    {"gpu_info": {"A10G": {"cost": 1.01, "tputs": [[2, 1], [5, 2]]}, ...},
     "workload_distribution": [[0.2, 0.1], [0.5, 0.2]], "total_request_rate": 30.0, "slice_factor": 1}

Rows are input sizes and columns output sizes; the file has no edges, so that the sizes are numbered.
"""

from pathlib import Path

import numpy as np

from jaxstack.fleet.allocation.problem import AllocationProblem
from jaxstack.fleet.allocation.workload import Workload
from jaxstack.fleet.profile.files import read_json
from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.throughput import AcceleratorType, LatencyObjective, ThroughputProfile
from jaxstack.runtime.errors import UserError


def load_authors_problem(path: str | Path) -> AllocationProblem:
    """The problem in such a file, without headroom, as the authors solve it.

    Raises:
      UserError: no such file, a field is missing or of another kind; a distribution that does not sum to 1.
    """
    found = read_json(Path(path), "a problem with gpu_info")
    try:
        distribution = np.array(found["workload_distribution"], dtype=float)
        if distribution.ndim != 2:
            raise UserError(f"workload_distribution: found {distribution.ndim} dimensions, expected rows of numbers")
        grid = LengthGrid(tuple(range(1, distribution.shape[0] + 1)), tuple(range(1, distribution.shape[1] + 1)))
        table = found["gpu_info"]
        types = tuple(AcceleratorType(name, float(info["cost"]), info.get("max_count")) for name, info in table.items())
        profile = ThroughputProfile(
            grid,
            {name: info["tputs"] for name, info in table.items()},
            LatencyObjective(float("inf")),
            provenance={"format": "Melange"},
        )
        workload = Workload(grid, float(found["total_request_rate"]), distribution)
        return AllocationProblem(workload, types, profile, headroom=0.0, slice_factor=found.get("slice_factor"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"{path}: {what}, expected gpu_info, workload_distribution, total_request_rate") from None
