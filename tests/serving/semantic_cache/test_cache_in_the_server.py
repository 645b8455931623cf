"""The cache in a real server, through the real client: what a hit looks like, who sees what, and the endpoints."""

import shutil
import threading

import httpx
import numpy as np
import openai
import pytest

from jaxstack.serving import BackgroundServer, EngineModel, ServerConfig
from jaxstack.serving.semantic_cache import CacheConfig, SemanticCache
from jaxstack.serving.semantic_cache.judge import LMJudge

KEYS = {"red": "key-red", "blue": "key-blue"}
# A short answer that ends by itself, whatever the random model would say.
FORM = {"guided_choice": ["yes it is, and always was", "no"]}


class Words:
    """A direction a first word; what follows turns a little."""

    id, dim = "words", 64

    def embed(self, texts):
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts):
            word, _, rest = text.partition(" ")
            row[hash_of(word)] = 1.0
            row[(hash_of(word) + 1) % self.dim] = 0.02 * (len(rest) % 5)
            row /= np.linalg.norm(row)
        return rows


def hash_of(word):
    return sum(ord(letter) * 7**place for place, letter in enumerate(word)) % 64


@pytest.fixture(scope="module")
def cached(engine):
    settings = CacheConfig(policy="static", threshold=0.9, lookup_timeout_ms=30_000, feedback_per_minute=20)
    config = ServerConfig(port=0, model_name="tiny", api_key="key-shared", api_keys=KEYS)
    with SemanticCache(Words(), settings) as cache, BackgroundServer(engine, config, cache) as server:
        yield server


@pytest.fixture(scope="module")
def ask(cached):
    """(owner, text) -> status headers, message or text of the answer."""
    clients = {
        owner: openai.OpenAI(
            base_url=cached.base_url,
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )
        for owner, key in {**KEYS, "shared": "key-shared"}.items()
    }

    def ask(text, owner="red", extra=None, **fields):
        fields = {"model": "tiny", "temperature": 0, **fields}
        return clients[owner].chat.completions.with_raw_response.create(
            messages=[{"role": "user", "content": text}], extra_body={**FORM, **(extra or {})}, **fields
        )

    yield ask
    for client in clients.values():
        client.close()


def requests(engine):
    return sum(engine.stats().finished.values())


def test_a_hit_answers_from_the_cache(engine, ask):
    first = ask("paris is nice")
    assert first.headers["x-cache"] == "miss"
    assert "age" not in first.headers
    before = requests(engine)
    again, near = ask("paris is nice"), ask("paris is it nice")
    assert requests(engine) == before
    assert (again.headers["x-cache"], near.headers["x-cache"]) == ("exact", "hit")
    assert near.headers["x-cache-entry"] == again.headers["x-cache-entry"]
    assert 0.9 < float(near.headers["x-cache-similarity"]) < 1
    assert int(near.headers["age"]) >= 0
    one, two = first.parse(), near.parse()
    assert two.choices[0].message == one.choices[0].message
    assert two.choices[0].finish_reason == "stop"
    assert two.usage.completion_tokens == one.usage.completion_tokens
    assert two.usage.model_extra["cached_response"] is True
    assert "cached_response" not in (one.usage.model_extra or {})
    assert two.id != one.id
    assert ask("london is nice").headers["x-cache"] == "miss"


def test_a_replayed_stream_has_the_same_text(ask):
    text = ask("stream me").parse().choices[0].message.content
    for words, kind in (("stream me", "exact"), ("stream me please", "hit"), ("flow me", "miss"), ("flow me", "exact")):
        raw = ask(words, stream=True, stream_options={"include_usage": True})
        assert raw.headers["x-cache"] == kind
        chunks = list(raw.parse())
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) in (text, *FORM["guided_choice"])
        if words.startswith("stream"):
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
            assert chunks[0].choices[0].delta.role == "assistant"
            assert len(chunks) > 3 or len(text) < 4
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage.completion_tokens > 0
        assert ("cached_response" in (chunks[-1].usage.model_extra or {})) == (kind != "miss")


def test_keys_do_not_see_each_others_answers(ask):
    assert ask("secret of red", owner="red").headers["x-cache"] == "miss"
    for owner in ("blue", "shared"):
        assert ask("secret of red", owner=owner).headers["x-cache"] == "miss"
        # What the body says of its user changes nothing.
        assert ask("secret of it", owner=owner, user="red").headers["x-cache"] == "hit"
    assert ask("secret of red", owner="red").headers["x-cache"] == "exact"


def test_what_is_passed_over_says_why(engine, ask):
    ask("passed by")
    before = requests(engine)
    for fields, reason in (
        ({"n": 2}, "n"),
        ({"temperature": 0.8}, "temperature"),
        ({"logprobs": True}, "logprobs"),
        ({"extra": {"cache": {"mode": "off"}}}, "off"),
    ):
        raw = ask("passed by", **fields)
        assert (raw.headers["x-cache"], raw.headers["x-cache-reason"]) == ("bypass", reason)
        assert raw.parse().choices
    assert requests(engine) == before + 4
    assert ask("passed by", extra={"cache": {"mode": "refresh"}}).headers["x-cache"] == "miss"
    assert ask("passed by", max_tokens=40).headers["x-cache"] == "miss"
    with pytest.raises(openai.BadRequestError, match=r"cache\.delta"):
        ask("passed by", extra={"cache": {"delta": 2}})


def test_completions_are_cached_apart_from_chats(cached, ask):
    ask("prompt here")
    body = {"model": "tiny", "prompt": "prompt here", "temperature": 0, "max_tokens": 64, **FORM}
    headers = {"authorization": "Bearer key-red"}
    with httpx.Client(trust_env=False, timeout=60, headers=headers) as http:
        first, again = (http.post(f"{cached.base_url}/completions", json=body) for _ in range(2))
        assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "exact")
        assert first.json()["choices"] == again.json()["choices"]
        shown = http.post(f"{cached.base_url}/completions", json={**body, "logprobs": 0})
        assert (shown.headers["x-cache"], shown.headers["x-cache-reason"]) == ("bypass", "logprobs")
        assert len(shown.json()["choices"][0]["logprobs"]["tokens"]) > 1
        # What a chat would read says nothing here.
        for prompt in ("one", "two"):
            other = {**body, "prompt": prompt, "messages": [{"role": "user", "content": "prompt here"}]}
            assert http.post(f"{cached.base_url}/completions", json=other).headers["x-cache"] != "exact"
        several = http.post(f"{cached.base_url}/completions", json={**body, "prompt": ["a", "b"]})
        assert several.headers["x-cache"] == "bypass"
        assert len(several.json()["choices"]) == 2


def test_equal_requests_at_once_share_a_generation(engine, ask):
    before, kinds = requests(engine), []
    barrier = threading.Barrier(12)

    def work():
        barrier.wait()
        kinds.append(ask("together now", max_tokens=33).headers["x-cache"])

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert requests(engine) == before + 1
    assert kinds.count("miss") == 1
    assert set(kinds) <= {"miss", "coalesced", "exact"}


def test_feedback_and_invalidation_and_stats(cached, ask):
    def call(method, path, body=None, owner="red", status=200):
        headers = {"authorization": f"Bearer {KEYS[owner]}"}
        reply = http.request(method, f"{cached.base_url}/cache/{path}", json=body, headers=headers)
        assert reply.status_code == status, reply.text
        return reply.json()

    with httpx.Client(trust_env=False, timeout=60) as http:
        assert http.get(f"{cached.base_url}/cache/stats").status_code == 401
        ask("wrong you are")
        ids = [ask(f"wrong you are {'so ' * n}").parse().id for n in (1, 2)]
        number = int(ask("wrong you are").headers["x-cache-entry"])
        shown = call("GET", f"entries/{number}")
        assert shown["prompt"] == "wrong you are"
        assert shown["hits"] == 3
        call("GET", f"entries/{number}", owner="blue", status=404)
        call("POST", "feedback", {"response_id": ids[0], "correct": False}, owner="blue", status=404)
        call("POST", "feedback", {"response_id": ids[0], "correct": False})
        call("POST", "feedback", {"response_id": ids[0], "correct": False}, status=404)
        call("POST", "feedback", {"response_id": ids[1], "correct": "no"}, status=400)
        call("POST", "feedback", {"correct": False}, status=400)
        call("POST", "feedback", {"response_id": ids[1], "correct": False})
        assert ask("wrong you are").headers["x-cache"] == "miss"
        for _ in range(20):
            reply = http.post(
                f"{cached.base_url}/cache/feedback",
                json={"response_id": "x", "correct": True},
                headers={"authorization": "Bearer key-red"},
            )
        assert reply.status_code == 429

        ask("delete me", owner="blue")
        assert call("POST", "invalidate", {"prompt_prefix": "delete"}) == {"removed": 0}
        assert call("POST", "invalidate", {"prompt_prefix": "delete"}, owner="blue") == {"removed": 1}
        call("POST", "invalidate", {}, status=400)
        call("POST", "invalidate", {"older_than_s": -1}, status=400)
        told = call("POST", "invalidate", {"model": "tiny", "prefix": "delete"}, status=400)
        assert told["error"]["param"] == "prefix"
        assert "prompt_prefix" in told["error"]["message"]
        assert ask("delete me", owner="blue").headers["x-cache"] == "miss"
        stats = call("GET", "stats", owner="blue")
        assert stats["requests"]["miss"] >= 2
        assert stats["delta"] is None  # a fixed threshold promises nothing
        assert stats["stopped"] is None

        text = http.get(f"{cached.url}/metrics").text
        assert 'jaxstack:cache_requests_total{kind="hit",model_name="tiny"}' in text
        snapshot = http.get(f"{cached.url}/page/snapshot").json()
        assert snapshot["cache"]["requests"]["hit"] > 0
        assert 'id="cache"' in http.get(cached.url).text


def test_without_a_cache_nothing_is_said_of_one(server, client):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2, temperature=0
    )
    assert "x-cache" not in raw.headers
    with pytest.raises(openai.NotFoundError):
        client.get("/cache/stats", cast_to=object)


def test_the_served_model_can_judge(engine):
    """A random model says something, but nothing other than yes or no; equal texts do not ask it."""
    judge = LMJudge(EngineModel(engine))
    before = requests(engine)
    assert judge.same("how much?", "It is 5.", "it is 5") is True
    assert requests(engine) == before
    assert judge.same("how much?", "five", "six") in (True, False)
    assert requests(engine) == before + 1


def test_the_page_shows_the_cache(cached, ask):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine; `make test` installs it where it may (apt-get, as root)")
    ask("on the page")
    ask("on the page")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page, complaints = chromium.new_page(), []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(cached.url)
        page.wait_for_selector("#cache:not([hidden])", timeout=30_000)
        assert "nothing is promised" in page.text_content("#promise")
        assert "exact" in page.text_content("#kindnames")
        assert "answers" in page.text_content("#cachestate")
        assert not complaints
        chromium.close()
