"""The study of long chains of thought: which property of the demonstrations teaches a model to reason?

A thought becomes steps (`steps.py`), steps are perturbed (`perturb.py`: content, by wrong results, noise or missing
keywords; structure, by shuffled, deleted or foreign steps), and one model is trained on each version and measured on
the same held-out problems. `recipe.py` makes demonstrations with a teacher. After Li, Cao, Griggs et
al., "LLMs Can Easily Learn to Reason from Demonstrations", arXiv 2502.07374.
"""

from jaxstack.reasoning.longcot.perturb import KINDS, perturb, perturb_response
from jaxstack.reasoning.longcot.steps import KEYWORDS, join_steps, keyword_spans, split_response, split_steps

__all__ = [
    "KEYWORDS",
    "KINDS",
    "join_steps",
    "keyword_spans",
    "perturb",
    "perturb_response",
    "split_response",
    "split_steps",
]
