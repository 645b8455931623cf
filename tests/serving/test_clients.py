"""Whose request it is, and what is shown of clients."""

import concurrent.futures

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxstack.engine import FairnessReading
from jaxstack.engine.scheduling import ClientAccount, policy_named
from jaxstack.runtime.errors import UserError
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.serving.clients import ANONYMOUS, Caller, key_fits
from jaxstack.serving.fairness import OTHERS, of_clients

KEYS = {"acme": "key-a", "zeta": "key-z"}


@pytest.fixture(scope="module")
def shared(engine):
    """A server with keys of owners, and one without an owner; it trusts `X-Client-Id`, and is fair."""
    plain = engine.scheduler.policy
    fair = policy_named("dlpm", quantum=50, weights={"acme": 2})
    engine._driver.between_turns(lambda: setattr(engine.scheduler, "policy", fair))
    config = ServerConfig(port=0, model_name="tiny", api_key="common", api_keys=KEYS, trust_client_id=True)
    with BackgroundServer(engine, config) as server:
        yield server
    engine._driver.between_turns(lambda: setattr(engine.scheduler, "policy", plain))


def served(engine) -> dict[str, int]:
    return {client: account.service for client, account in engine.fairness().clients.items()}


@pytest.mark.parametrize(
    ("key", "headers", "user", "client"),
    [
        ("key-a", {"x-client-id": "gateway's"}, "me", "acme"),
        ("key-z", {}, None, "zeta"),
        ("common", {"x-client-id": "gateway's"}, "me", "gateway's"),
        ("common", {}, "me", "me"),
        ("common", {}, "acme", "user:acme"),
        ("common", {}, None, "127.0.0.1"),
    ],
)
def test_the_engine_learns_whose_request_it_is(engine, shared, key, headers, user, client):
    before = served(engine)
    with openai.OpenAI(
        base_url=shared.base_url,
        api_key=key,
        default_headers=headers,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as asking:
        extra = {} if user is None else {"user": user}
        say = [{"role": "user", "content": "hello"}]
        asking.chat.completions.create(model="tiny", messages=say, max_tokens=3, **extra)
        asking.completions.create(model="tiny", prompt="hello", max_tokens=3, **extra)
        between = served(engine)
        asking.embeddings.create(model="tiny", input="good day", **extra)
    after = served(engine)
    assert before.get(client, 0) < between[client] < after[client]
    assert {name: value for name, value in after.items() if value != before.get(name, 0)} == {client: after[client]}


def test_a_wrong_key_is_refused_and_every_right_one_taken(http: httpx.Client, shared: BackgroundServer):
    for key, status in (("key-a", 200), ("key-z", 200), ("common", 200), ("key", 401), ("key-aa", 401)):
        reply = http.get(f"{shared.base_url}/models", headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == status, key
    assert key_fits("key-z", shared.config) == (True, "zeta") and key_fits("kéy", shared.config) == (False, None)
    assert key_fits("common", shared.config) == (True, None)


def test_the_header_counts_only_where_it_is_trusted():
    assert Caller(named=None, address="10.0.0.1").client(None) == "10.0.0.1"
    assert Caller().client(None) == Caller().client(" ") == ANONYMOUS
    assert len(Caller().client("x" * 1000)) == 128 and Caller().client("a\ud800") == "a?"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"a": ""}, "api_keys['a']: found 'no key', expected both"),
        ({"": "k"}, "api_keys['']: found 'no name', expected both"),
        ({"a": "k", "b": "k"}, "api_keys: found 'the same key twice', expected different keys"),
    ],
)
def test_keys_that_tell_nobody_apart_are_refused(keys, words):
    with pytest.raises(UserError) as refused:
        ServerConfig(api_keys=keys)
    assert str(refused.value) == words


def test_metrics_and_page_show_who_has_had_what(http: httpx.Client, engine, shared: BackgroundServer):
    def ask(i):
        body = {"prompt": f"{i} " * 20, "max_tokens": 12, "ignore_eos": True}
        key = ["key-a", "key-z"][i % 2]
        reply = http.post(
            f"{shared.base_url}/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=600
        )
        assert reply.status_code == 200

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        list(pool.map(ask, range(24)))
    samples = {}
    for family in text_string_to_metric_families(http.get(f"{shared.url}/metrics").text):
        for sample in family.samples:
            samples[sample.name, sample.labels.get("client")] = sample.value
    reading = engine.fairness()
    assert reading.policy == "dlpm" and reading.errors == 0 and reading.pair in (("acme", "zeta"), ("zeta", "acme"))
    assert samples["jaxstack:fairness_gap", None] == reading.max_gap > 0
    assert samples["jaxstack:fairness_bound", None] == reading.bound >= reading.max_gap
    assert samples["jaxstack:scheduler_errors_total", None] == 0
    for client in ("acme", "zeta"):
        account = reading.clients[client]
        assert samples["jaxstack:client_service_total", client] == account.service > 12 * (20 + 2 * 12)
        assert samples["jaxstack:client_deficit", client] == reading.deficits[client]
        assert samples["jaxstack:client_wait_seconds_count", client] == account.starts >= 12
        assert samples["jaxstack:client_wait_seconds_sum", client] == account.wait_s > 0
        assert samples["jaxstack:client_waiting", client] == 0
    shown = http.get(f"{shared.url}/page/snapshot").json()["fairness"]
    assert shown["policy"] == "dlpm" and shown["bound"] == reading.bound
    assert {"acme", "zeta"} <= {row["client"] for row in shown["clients"]}


def test_many_clients_become_few_rows():
    def reading(count):
        accounts = {f"c{i}": ClientAccount(service=1000 - i, starts=1, wait_s=0.5) for i in range(count)}
        accounts[""] = ClientAccount(service=1)
        accounts[ANONYMOUS] = ClientAccount(service=2)
        deficits = dict.fromkeys(accounts, -3)
        return FairnessReading(
            "dlpm", 0.0, 0.0, None, None, None, True, 0, 0, 0, 0, accounts, {"c0": 2, "c99": 3}, deficits
        )

    rows = of_clients(reading(100), limit=50)
    assert [row.client for row in rows] == [f"c{i}" for i in range(50)] + [OTHERS]
    assert rows[0].waiting == 2 and rows[-1].waiting == 3 and rows[-1].deficit == -3 * 52
    assert sum(row.service for row in rows) == sum(1000 - i for i in range(100)) + 3
    rows = of_clients(reading(100), limit=50, first=["c99", ANONYMOUS])
    assert {"c99", ANONYMOUS} <= {row.client for row in rows} and len(rows) == 51
    assert len(of_clients(reading(3))) == 4, "the nameless and the anonymous are one"


@pytest.mark.parametrize(
    ("caller", "tenant"),
    [
        (Caller(owner="acme", named="zeta"), "key:acme"),
        (Caller(named="acme"), "client:acme"),  # not the owner of the key
        (Caller(named="  ", address="10.0.0.1"), ""),
        (Caller(address="10.0.0.1"), ""),
    ],
)
def test_whose_cached_answers_it_may_have(caller, tenant):
    """Keys and what a gateway vouches for; two kinds of name that never meet. Addresses are nobody's."""
    assert caller.tenant == tenant
