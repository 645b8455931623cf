"""jaxstack: one JAX stack for language-model systems research.

Data becomes weights (`jaxstack.training`), weights become a served model (`jaxstack.engine`, `jaxstack.serving`), and a
served model becomes applications (`jaxstack.reasoning`). Floors import only from below:

    launch > configs > reasoning > serving, training > engine > models > runtime > kernels
"""

import kernels as _kernels

if getattr(_kernels, "BELONGS_TO", None) != "jaxstack":
    raise ImportError(
        f"the package `kernels` found at {_kernels.__file__} is not jaxstack's: another distribution of that name is "
        "installed; uninstall it or put jaxstack's own directory first on the path"
    )

__version__ = "0.1.0"
