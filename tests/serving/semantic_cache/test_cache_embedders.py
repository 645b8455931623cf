"""Embedders without weights: what hashed n-grams know and do not, versions of their weights, endpoints."""

import http.server
import json
import threading

import numpy as np
import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.embedders import HashedNgramEmbedder, RemoteEmbedder


def cosine(embedder, a, b):
    x = embedder.embed([a, b]).astype(np.float64)
    return float(x[0] @ x[1])


class TestHashedNgrams:
    def test_unit_rows_that_depend_on_nothing_but_the_text(self):
        embedder = HashedNgramEmbedder(256)
        texts = ["How do I sort a list?", "naïve café", "", "?!", "x" * 5000, "\ud800 half"]
        rows = embedder.embed(texts)
        assert rows.shape == (6, 256) and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 0, 0, 1, 1], atol=1e-5)
        for text, row in zip(texts, rows):
            np.testing.assert_array_equal(HashedNgramEmbedder(256).embed([text])[0], row)
        assert embedder.embed([]).shape == (0, 256)

    def test_typos_and_word_order_stay_near_and_other_questions_do_not(self):
        embedder = HashedNgramEmbedder()
        asked = "How do I reverse a string in Python?"
        for same in ("how do i reverse a string in python", "How do I revrse a string in Python?", "In Python, how "
                     "do I reverse a string?"):  # fmt: skip
            assert cosine(embedder, asked, same) > 0.7, same
        for other in ("How do I reverse a string in Rust?", "What is the weather in Oslo?"):
            assert cosine(embedder, asked, other) < 0.7, other
        # What few texts hold says more than what all do.
        assert cosine(embedder, "the weather in Oslo", "weather Oslo") > cosine(embedder, "the of in", "the of a")

    def test_signs_and_two_buckets_keep_unlike_texts_apart(self):
        rng = np.random.default_rng(0)
        words = ["".join(chr(97 + c) for c in rng.integers(26, size=8)) for _ in range(400)]
        x = HashedNgramEmbedder().embed([" ".join(words[i : i + 4]) for i in range(0, 400, 4)]).astype(np.float64)
        off = (x @ x.T)[np.triu_indices(100, 1)]
        assert abs(off.mean()) < 0.02 and np.abs(off).max() < 0.35

    def test_counting_makes_a_new_version_and_leaves_the_old_one(self):
        first = HashedNgramEmbedder()
        texts = [f"ticket number {i} about billing" for i in range(300)]
        before = first.embed(["billing ticket 7"])
        first.count(texts)
        assert first.waiting == 300
        np.testing.assert_array_equal(first.embed(["billing ticket 7"]), before)
        second = first.recounted()
        assert second.id != first.id and second.dim == first.dim and second.waiting == 0
        assert second.idf("billing") < first.idf("billing") and second.idf("rare") > first.idf("rare")
        # What all texts hold no longer makes them alike.
        assert cosine(second, "ticket about billing", "ticket about refunds") < cosine(
            first, "ticket about billing", "ticket about refunds"
        )
        again = HashedNgramEmbedder(**json.loads(json.dumps(second.state())))
        assert again.id == second.id
        np.testing.assert_array_equal(again.embed(texts[:3]), second.embed(texts[:3]))

    def test_long_words_are_not_remembered(self):
        """Tokens, data and languages without spaces: each takes as much again as its length, and none comes twice."""
        embedder = HashedNgramEmbedder(64)
        texts = [f"{'abcdefgh' * 200}{n} short {'x' * 100}{n}" for n in range(20)]
        rows = embedder.embed(texts)
        assert embedder._remembered_word.cache_info().currsize == 1
        assert embedder._remembered_pair.cache_info().currsize == 0
        np.testing.assert_array_equal(rows[3], HashedNgramEmbedder(64).embed(texts[3:4])[0])

    def test_threads_may_count(self):
        embedder = HashedNgramEmbedder(64)
        threads = [threading.Thread(target=embedder.count, args=[["one two"] * 50]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert embedder.recounted().state()["counts"] == {"one": 400, "two": 400}

    def test_a_width_that_is_none(self):
        with pytest.raises(UserError, match="dim: found 3, expected at least 16"):
            HashedNgramEmbedder(3)


class TestRemote:
    def test_nobody_there_is_one_line(self):
        with pytest.raises(UserError, match="embeddings of 'm' at") as error:
            RemoteEmbedder("http://127.0.0.1:9/v1", "m", max_retries=0)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "answer",
        [
            {"data": [{"index": 0, "embedding": [1.0, None]}]},
            {"data": []},
            {"nothing": 1},
            {"data": [{"index": 0, "embedding": "abc"}]},
        ],
    )
    def test_answers_of_another_form(self, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["content-length"]))
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
            thread = threading.Thread(target=web.serve_forever)
            thread.start()
            try:
                with pytest.raises(UserError, match=r"found (no vectors|an array)"):
                    RemoteEmbedder(f"http://127.0.0.1:{web.server_port}/v1", "m", max_retries=0)
            finally:
                web.shutdown()
                thread.join()
