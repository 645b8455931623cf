"""The settings of a cache."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.policies import POLICIES, PROMISING, make_policy
from jaxstack.serving.semantic_cache.policy import check_delta

SCOPE_FIELDS = ("tenant", "model", "system", "history", "tools", "response_format", "sampling")


@dataclasses.dataclass(frozen=True)
class TenantOverrides:
    """What is different for one tenant.

    Args:
      delta: its own bound on errors.
      max_entries: its own quota.
      share_group: tenants of a group share entries and budget, as if they were one. Nobody else shares anything.
    """

    delta: float | None = None
    max_entries: int | None = None
    share_group: str | None = None


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Settings of `SemanticCache`. Times are seconds.

    Args:
      delta: wrong answers per request at most, as a share; more than 0, at most 0.5.
      policy: one of `POLICIES`.
      tau_min: "bayes" asks the model at least with this probability, so that it goes on learning.
      k: candidates that "bayes" looks at.
      threshold: of the policies "static" and "gptcache".
      scope_fields: what must be equal before texts are compared at all. "tenant" cannot be left out.
      revision: of the models behind; what another revision has answered is not used.
      revisions: of models that have one of their own, by name.
      embed_history: the turns before the last are not compared exactly, but embedded together with it.
      ttl_s: how long an answer is good for; None is for ever.
      max_entries, max_bytes: of all tenants together.
      eviction: "cost" keeps what has saved most generation time for its size, "lru" what was used last.
      max_prompt_chars: longer texts are only ever found by the exact tier.
      max_response_bytes: larger answers are not kept.
      max_temperature: answers drawn at a higher one are samples among many, and are kept only if a request asks for it.
      path: file of the durable store; None keeps everything in memory.
      seed: of the exploring coin.
      shadow: decide and learn, but let the model answer everything. What the cache would have said is compared.
      refresh_on_agree: an explored answer that agrees replaces the one in the cache.
      label_timeout_s: an explored request without an answer by then will have no label.
      max_pending: labels outstanding at most, as `ErrorBudget`.
      strict_labels: as `ErrorBudget`.
      lookup_timeout_ms: an embedder that takes longer is passed over; the request is served by the model.
      replay_tokens_per_s: pace of a replayed stream; None is at once.
      feedback_per_minute: reports taken from one tenant.
      tenants: what is different for some.

    Raises:
      UserError: a value out of range; the message names the field.
    """

    delta: float = 0.02
    policy: str = "bayes"
    tau_min: float = 0.05
    k: int = 4
    threshold: float = 0.8
    scope_fields: tuple[str, ...] = SCOPE_FIELDS
    revision: str = ""
    revisions: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    embed_history: bool = False
    ttl_s: float | None = 86_400
    max_entries: int = 100_000
    max_bytes: int = 2 << 30
    eviction: str = "cost"
    max_prompt_chars: int = 8_192
    max_response_bytes: int = 1 << 20
    max_temperature: float = 0.3
    path: str | None = None
    seed: int = 0
    shadow: bool = False
    refresh_on_agree: bool = False
    label_timeout_s: float = 600
    max_pending: int = 64
    strict_labels: bool = False
    lookup_timeout_ms: float = 50
    replay_tokens_per_s: float | None = None
    feedback_per_minute: int = 60
    tenants: Mapping[str, TenantOverrides] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_delta(self.delta)
        for name, own in self.tenants.items():
            if own.delta is not None and not 0 < own.delta <= 0.5:
                _refuse(f"tenants[{name!r}].delta", own.delta, "more than 0 and at most 0.5")
            if own.max_entries is not None and not own.max_entries >= 1:
                _refuse(f"tenants[{name!r}].max_entries", own.max_entries, "an integer >= 1")
        if self.policy not in POLICIES:
            _refuse("policy", self.policy, f"one of {', '.join(POLICIES)}")
        if not 0 < self.tau_min < 1:
            _refuse("tau_min", self.tau_min, "more than 0 and less than 1")
        unknown = [field for field in self.scope_fields if field not in SCOPE_FIELDS]
        if unknown or "tenant" not in self.scope_fields:
            _refuse("scope_fields", self.scope_fields, f'"tenant" and others of {", ".join(SCOPE_FIELDS)}')
        if self.eviction not in ("cost", "lru"):
            _refuse("eviction", self.eviction, "cost or lru")
        for name in ("k", "max_entries", "max_bytes", "max_prompt_chars", "max_response_bytes", "max_pending"):
            if not getattr(self, name) >= 1:
                _refuse(name, getattr(self, name), "an integer >= 1")
        for name in ("max_temperature", "feedback_per_minute"):
            if not getattr(self, name) >= 0:
                _refuse(name, getattr(self, name), "a number >= 0")
        for name in ("ttl_s", "label_timeout_s", "lookup_timeout_ms", "replay_tokens_per_s"):
            value = getattr(self, name)
            if value is None and name in ("ttl_s", "replay_tokens_per_s"):
                continue
            if value is None or not 0 < value < math.inf:
                _refuse(name, value, "a positive number")
        # Whatever else a policy does not take is to be known now, and not with the first request.
        make_policy(self.policy, delta=self.delta, tau_min=self.tau_min, k=self.k, threshold=self.threshold)

    @property
    def promises(self) -> bool:
        """Whether the policy holds itself to delta."""
        return self.policy in PROMISING

    def owner(self, tenant: str) -> str:
        """Whose entries a tenant's are: its own, or its group's. The two kinds of name never meet."""
        own = self.tenants.get(tenant)
        return f"t:{tenant}" if own is None or own.share_group is None else f"g:{own.share_group}"

    def delta_of(self, owner: str) -> float:
        """The strictest of its tenants'."""
        own = [o.delta for name, o in self.tenants.items() if self.owner(name) == owner and o.delta is not None]
        return min(own, default=self.delta)

    def quota_of(self, owner: str) -> int:
        own = [o.max_entries for name, o in self.tenants.items() if self.owner(name) == owner]
        return min([n for n in own if n is not None], default=self.max_entries)


def _refuse(name: str, found: Any, expected: str) -> None:
    raise UserError(f"{name}: found {found!r}, expected {expected}", exit_code=2)
