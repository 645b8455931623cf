"""The semantic cache: answers from earlier answers when they would be right, with an error rate that the operator sets.

A request is reduced to its scope (who asks, and what must match exactly) and its last turn (`scope.py`). The same
request again is answered by the exact tier; one that is being answered is joined (`flight.py`). Otherwise the last turn
is embedded, its nearest entries are found in the scope's own index (`index.py`), and the policy (`policy.py`,
`policies.py`) decides: answer, or explore. What was explored is compared with what the cache would have said
(`learning.py`, `judge.py`), and the label teaches the policy.
"""

from jaxstack.serving.semantic_cache.cache import SemanticCache
from jaxstack.serving.semantic_cache.config import CacheConfig, TenantOverrides
from jaxstack.serving.semantic_cache.embedders import Embedder, HashedNgramEmbedder
from jaxstack.serving.semantic_cache.entry import CachedResponse
from jaxstack.serving.semantic_cache.lookup import Lookup

__all__ = [
    "CacheConfig",
    "CachedResponse",
    "Embedder",
    "HashedNgramEmbedder",
    "Lookup",
    "SemanticCache",
    "TenantOverrides",
]
