"""Tenants: what each sees, who shares, who gives way."""

from angles import Angles, ask, cache_of, said
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.serving.semantic_cache import CacheConfig, SemanticCache, TenantOverrides

_CALLS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "feedback", "invalidate", "entry", "stats", "repeat"]),
        st.sampled_from(["red", "blue", "t:red", ""]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 25),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(calls=_CALLS, policy=st.sampled_from(["static", "bayes", "vcache"]))
def test_tenants_never_see_each_others_answers(calls, policy):
    """Whatever is called, whatever comes back is of the tenant who calls, and nobody removes another's."""
    with cache_of(policy=policy, threshold=0.5, delta=0.5, max_entries=7) as cache:
        numbers = {}
        for call, tenant, word, degrees in calls:
            text = f"{word} {degrees}"
            if call == "ask":
                lookup = ask(cache, text, answer=f"secret of {tenant}", tenant=tenant)
                assert said(lookup) in (None, f"secret of {tenant}")
                assert lookup.candidate is None or lookup.candidate.text == f"secret of {tenant}"
                cache.remember(text, lookup)
                if lookup.entry_id is not None:
                    assert numbers.setdefault(lookup.entry_id, tenant) == tenant
            elif call == "repeat":
                found = cache.repeat(cache.scope.prompt(text, tenant=tenant))
                assert found is None or said(found) == f"secret of {tenant}"
            elif call == "entry":
                for number in range(1, 60):
                    entry = cache.entry(tenant, number)
                    assert entry is None or entry.response.text == f"secret of {tenant}"
            elif call == "feedback":
                for number, owner in numbers.items():
                    if owner != tenant:
                        assert cache.feedback(tenant, False, entry_id=number) is not True
                cache.feedback(tenant, False, response_id=text)
            elif call == "invalidate":
                others = {t: cache.stats(t).entries for t in ("red", "blue", "t:red", "") if t != tenant}
                cache.invalidate(tenant, everything=True)
                assert cache.stats(tenant).entries == 0
                assert {t: cache.stats(t).entries for t in others} == others
            else:
                assert cache.stats(None).entries <= 7


def test_groups_share_and_nobody_else():
    tenants = {"a": TenantOverrides(share_group="g"), "b": TenantOverrides(share_group="g", delta=0.01)}
    with cache_of(tenants=tenants, policy="bayes") as cache:
        ask(cache, "a", tenant="a")
        assert ask(cache, "a", tenant="b").kind == "exact"
        for stranger in ("g", "g:g", "", "c"):
            assert ask(cache, "a", tenant=stranger).kind == "miss"
        assert cache.stats("a").delta == cache.stats("b").delta == 0.01  # the strictest
        assert cache.stats("c").delta == 0.1


def test_a_tenant_that_floods_pushes_only_itself_out():
    with cache_of(max_entries=20, tenants={"small": TenantOverrides(max_entries=3)}) as cache:
        for n in range(5):
            ask(cache, f"a {n * 20}", tenant="quiet")
        for n in range(50):
            ask(cache, f"b {n} {n}", tenant="loud", sampling={"seed": n})
            ask(cache, f"c {n} {n}", tenant="small", sampling={"seed": n})
        assert cache.stats("quiet").entries == 5
        assert cache.stats("small").entries == 3
        assert cache.stats(None).entries == 20


def test_who_only_looks_leaves_nothing_behind():
    with cache_of(policy="bayes") as cache:
        for n in range(50):
            tenant = f"t{n}"
            assert cache.stats(tenant).entries == 0
            assert cache.entry(tenant, 1) is None
            assert cache.invalidate(tenant, everything=True) == 0
            assert cache.feedback(tenant, False, entry_id=1) is False
        assert not cache._accounts
        # One that asks is remembered, since its errors are counted, but takes little.
        ask(cache, "a", tenant="t")
        (account,) = cache._accounts.values()
        table = account.policy.table
        assert table._log.nbytes + table._ratio.nbytes < 50_000


def test_a_text_that_the_embedder_refuses_is_its_clients_alone():
    class Picky(Angles):
        def embed(self, texts):
            if any(text.startswith("bad") for text in texts):
                raise ValueError("too long")
            return super().embed(texts)

    with SemanticCache(Picky(), CacheConfig(policy="static", lookup_timeout_ms=30_000)) as cache:
        texts = {"quiet": "a", "loud": "bad 1", "other": "b"}
        found = cache.lookup([cache.scope.prompt(text, tenant=tenant) for tenant, text in texts.items()])
        assert [lookup.kind for lookup in found] == ["miss", "bypass", "miss"]
        assert found[1].reason == "embedder"
